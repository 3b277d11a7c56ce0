"""A run on wandb: its configuration, metrics, token tables and report."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from opsd.monitor.jsonl import finite_or_null

WANDB_INIT_TIMEOUT_S = 30.0
WANDB_FINISH_TIMEOUT_S = 60.0  # an upload that takes longer is left to `wandb sync`
PER_TOKEN = ("tokens", "entropy", "reverse_kl", "quadrant", "weight")  # lists of a token_rows record
TOKEN_COLUMNS = ("step", "rollout", "position", "token", "entropy", "reverse_kl", "quadrant", "weight")

logger = logging.getLogger(__name__)


class WandbRun:
    """A wandb run that cannot end ours: no network means offline, a failure later means a warning and no more wandb.

    A resumed run continues under its old wandb id, kept in output_dir/wandb/run_id.
    """

    def __init__(self, output_dir: Path, project: str, run_name: str, config_dict: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # Settings(silent=True) leaves some of its lines on
        import wandb  # two seconds, and not wanted at all where wandb_mode is "off"
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError
        from wandb.sdk.mailbox.mailbox_handle import ServerResponseError

        # wandb's own, and what a dead or unreachable wandb process makes its client raise
        self._errors = (
            wandb.Error, OSError, ValueError, RuntimeError,
            MailboxClosedError, HandleAbandonedError, ServerResponseError,
        )  # fmt: skip
        self._output_dir = output_dir
        id_file = output_dir / "wandb" / "run_id"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        options = {
            "dir": str(output_dir), "project": project, "name": run_name, "config": config_dict,
            "id": id_file.read_text().strip(), "resume": "allow",
        }  # fmt: skip
        self._run = None
        for mode in wandb_modes():
            try:
                self._run = _start_wandb(mode, options)
                return
            except self._errors as error:
                logger.warning("wandb cannot start %s: %s", mode, error)
                with suppress(*self._errors):
                    wandb.teardown()  # its process still holds the run id

    def log(self, record: dict[str, Any]) -> None:
        values = {name: value for name, value in finite_or_null(record).items() if value is not None}
        self._attempt(lambda run: run.log(values))

    def log_tokens(self, rows: list[dict[str, Any]]) -> None:
        """The token view's rollouts of one step as a table, one row per token."""
        import wandb

        step, table = rows[0]["step"], wandb.Table(columns=list(TOKEN_COLUMNS), data=token_table(rows))
        self._attempt(lambda run: run.log({"step": step, "tokens": table}))

    def log_report(self, path: Path) -> None:
        """report.html as a panel of the workspace, and among the run's files."""
        import wandb

        page = wandb.Html(path.read_text(encoding="utf-8"), inject=False)
        self._attempt(lambda run: run.log({"report": page}))
        self._attempt(lambda run: run.save(str(path), base_path=str(self._output_dir), policy="now"))

    def finish(self) -> None:
        self._attempt(lambda run: run.finish())
        self._run = None

    def _attempt(self, action: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except self._errors as error:
            logger.warning("wandb failed, going on without it: %s", error)
            self._run = None


def wandb_modes() -> tuple[str, ...]:
    """How to try to start, one after another: as wandb's own settings say, else online where there is a login.

    Settings are WANDB_MODE and what `wandb offline` or `wandb disabled` have stored; a login is WANDB_API_KEY, an
    identity token, the .netrc that `wandb login` writes, or a stored key. What cannot start online starts offline.
    """
    from wandb.errors import AuthenticationError
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    settings = wandb_setup.singleton().settings
    chosen = {"dryrun": "offline", "run": "online"}.get(settings.mode, settings.mode)
    if "mode" in settings.model_fields_set:
        return (chosen, "offline") if chosen in ("online", "shared") else (chosen,)
    try:
        login = settings.api_key or settings.identity_token_file or wbauth.read_netrc_auth(host=settings.base_url)
    except AuthenticationError as error:
        logger.warning("wandb: the stored login cannot be used: %s", error)
        login = None
    return ("online", "offline") if login else ("offline",)


def _start_wandb(mode: str, options: dict[str, Any]) -> Any:
    """A silent wandb run whose x axis is our "step": wandb's own cannot go back when a run resumes."""
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", disable_git=True, disable_code=True,
        init_timeout=WANDB_INIT_TIMEOUT_S, finish_timeout=WANDB_FINISH_TIMEOUT_S,
    )  # fmt: skip
    run = wandb.init(mode=mode, settings=settings, **options)
    run.define_metric("*", step_metric="step")
    return run


def token_table(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """TOKEN_COLUMNS of every token of these rollouts, as `opsd.monitor.step.token_rows` makes them, in order."""
    return [
        [row["step"], rollout, position, *values]
        for rollout, row in enumerate(rows)
        for position, values in enumerate(zip(*(row[name] for name in PER_TOKEN), strict=True))
    ]
