"""`sparse-gpt config`: show, schema."""

import typer

from sparse_gpt.cli.terminal import Config, Json, Overrides, print_json

config_app = typer.Typer(no_args_is_help=True, help="Run files: resolved, and what they may hold.")


@config_app.command(epilog="Example: sparse-gpt config show tiny-sparse seed=1")
def show(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """The whole run as a run file, with the line, preset or override that each value is from."""
    from sparse_gpt.config.origins import settings, to_commented_yaml

    found = settings(config, overrides or [])
    if as_json:
        rows = {".".join(one.keys): {"value": one.value, "from": one.origin} for one in found}
        print_json(rows)
    else:
        print(to_commented_yaml(found), end="")


@config_app.command(epilog="Example: sparse-gpt config schema > run.schema.json")
def schema() -> None:
    """The JSON schema of run files, with which editors check and complete them."""
    from sparse_gpt.config.reference import run_schema

    print_json(run_schema())
