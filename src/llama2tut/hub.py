"""Whether the hub can be asked: found out once, in seconds."""

import os

from llama2tut.errors import reason

SWITCHED_OFF = "HF_HUB_OFFLINE is set"
_PATIENCE = 5  # seconds for an answer
_silent: dict[str, str] = {}  # endpoint -> what came of asking it


def out_of_reach() -> str:
    """Why the hub cannot be asked, or "" where it can. From then on its libraries look into their caches alone.

    Left to themselves they would ask six times for each file, which takes half a minute or more.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return _silent.get(constants.ENDPOINT, SWITCHED_OFF)
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception as error:  # of its client: no network, no answer, or an HF_ENDPOINT that is no address
        where = f"HF_ENDPOINT {constants.ENDPOINT}" if "HF_ENDPOINT" in os.environ else "the hub"
        _silent[constants.ENDPOINT] = f"{where} cannot be reached ({reason(error)})"
        constants.HF_HUB_OFFLINE = True
        return _silent[constants.ENDPOINT]
    return ""
