"""The one table of faults: what is done, the exit code, the words that must appear, and what must still be intact."""

import rows_arguments
import rows_configuration
import rows_data
import rows_machine
import rows_models
import rows_security
from world import Row

SECTIONS: dict[str, tuple[Row, ...]] = {
    "Arguments": rows_arguments.ROWS,
    "Configuration": rows_configuration.ROWS,
    "Data": rows_data.ROWS,
    "Models and adapters": rows_models.ROWS,
    "Machine": rows_machine.ROWS,
    "Security": rows_security.ROWS,
}
ROWS = tuple(row for rows in SECTIONS.values() for row in rows)

if __name__ == "__main__":  # the table itself, as markdown
    for section, rows in SECTIONS.items():
        print(f"\n## {section}\n\n| what is done | exit code |\n|---|---|")
        print("\n".join(f"| {row.what} | {row.code} |" for row in rows))
