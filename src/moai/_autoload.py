"""The `torch.backends` entry point: called at the end of `import torch`.

In: the environment. Out: `torch.moreh`, and the accelerator as "cuda" if the user has one. Nothing here may break or
slow `import torch`: an error becomes one line of warning, and everything heavy waits for the device's first use.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moai.session import Session


def activate() -> None:
    """Makes the accelerator known to torch."""
    try:
        from moai.device import owner
        from moai.platform import activation

        owner.provide(_session)
        _offer_options()
        if activation.wanted():
            from moai.device import alias

            alias.turn_on()
    except Exception as error:
        reason = " ".join(str(error).split())
        logging.getLogger("moai").warning("The MoAI Accelerator is not available: %s: %s", type(error).__name__, reason)


def _session() -> Session:
    """The process's session, which imports the rest of the house."""
    from moai import session

    return session.current()


def _offer_options() -> None:
    """`torch.moreh`, by which scripts recognise the platform, is there even if the accelerator is not."""
    import torch

    import moreh.option

    torch.moreh = moreh  # type: ignore[attr-defined]
    sys.modules["torch.moreh"] = moreh
    sys.modules["torch.moreh.option"] = moreh.option
