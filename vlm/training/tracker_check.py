"""What a tracker needs, looked for before torch is imported: its package, and the login of Weights & Biases."""

import importlib.util
import os
from collections.abc import Sequence
from netrc import NetrcParseError, netrc
from urllib.parse import urlsplit

from vlm.common import UsageError, one_line, shorten


def check_trackers(names: Sequence[str]) -> None:
    """Look for the packages of trackers, and for a login, before anything is loaded or written.

    Raises:
        UsageError: there is none.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(not_importable(name, f"there is no package {name}"))
    if "wandb" in names:
        _check_wandb_login()


def _check_wandb_login() -> None:
    """Look for a login where wandb does, without asking its server or the user.

    Raises:
        UsageError: there is none, or a setting of wandb is wrong.
    """
    try:
        import wandb
    except ImportError as error:
        raise UsageError(not_importable("wandb", one_line(error))) from error
    try:
        if mode := os.environ.get("WANDB_MODE"):
            wandb.Settings.model_validate({"mode": mode})
        settings = wandb.setup().settings
    except Exception as error:
        raise wandb_login(error) from error
    host = urlsplit(settings.base_url).netloc
    given = (os.environ.get("WANDB_API_KEY"), settings.api_key, getattr(settings, "identity_token_file", None))
    if settings.mode in ("online", "shared") and not any(given) and not _in_netrc(host):
        raise wandb_login(RuntimeError(f"there is no login for {host}"))


def _in_netrc(host: str) -> bool:
    """Whether a `.netrc` may have a login for a host or another server of wandb; wandb itself looks closer."""
    named = os.environ.get("NETRC")
    for path in (named,) if named else ("~/.netrc", "~/_netrc"):
        try:
            if any(known == host or "wandb" in known for known in netrc(os.path.expanduser(path)).hosts):
                return True
        except FileNotFoundError:
            continue
        except (OSError, NetrcParseError):
            return True
    return False


def wandb_login(error: Exception) -> UsageError:
    """The error of Weights & Biases that cannot be used as it is set up."""
    return UsageError(
        f"--report-to wandb: {in_short(error)}.\n"
        "       Log in with `wandb login`, or set WANDB_MODE=offline, or leave out --report-to wandb (or --use-wandb)."
    )


def not_importable(name: str, reason: str) -> str:
    """What to do if the package of a tracker cannot be imported."""
    return (
        f"--report-to {name}: {name} cannot be imported ({reason}). Run `pip install {name}`, or leave out "
        f"--report-to {name}."
    )


def in_short(error: BaseException) -> str:
    """An error of a tracker in one line of at most 300 characters, without a full stop."""
    return shorten(one_line(error).rstrip("."), 300)
