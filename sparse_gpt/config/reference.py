"""What a run file may hold: as JSON schema for editors, and as tables for docs/configuration.md,
which `python -m sparse_gpt.config.reference docs/configuration.md` brings up to date."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from sparse_gpt.config.schema import RunConfig
from sparse_gpt.model.config import FFN_PRESETS, SIZES

_SIGNS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


class _Generator(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # it would only repeat the key

    def int_schema(self, schema: Any) -> JsonSchemaValue:
        """10_000 too: a number to us, but text to editors, which read YAML 1.2."""
        number = super().int_schema(schema)
        return {**number, "type": ["integer", "string"], "pattern": r"^\d+(_\d+)+$"}


def run_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a run file as one writes it: with `base`, presets and short
    forms. With `base` no key is required. Relations between values are left to `load_config`."""
    schema = _schema()
    complete: dict[str, Any] = {"required": schema.pop("required"), "properties": {}}
    for key, value in schema["properties"].items():
        part = schema["$defs"].get(_part(value), {})
        if "required" in part:
            complete["properties"][key] = {"required": part.pop("required")}
    complete["properties"]["model"] = {
        "anyOf": [{"required": ["preset"]}, complete["properties"]["model"]],
        "properties": {"ffn": {"anyOf": [{"required": ["preset"]}, {"required": ["kind"]}]}},
    }
    dialect = {"$schema": GenerateJsonSchema.schema_dialect}
    return dialect | schema | {"if": {"required": ["base"]}, "else": complete}


def _schema() -> dict[str, Any]:
    """RunConfig's, with what `load_config` takes besides."""
    schema = RunConfig.model_json_schema(schema_generator=_Generator)
    schema["required"].remove("run_dir")
    base = {"type": "string", "description": "Run file to inherit from, seen from this one."}
    schema["properties"] = {"base": base, **schema["properties"]}
    ffn = schema["$defs"]["ModelConfig"]["properties"]["ffn"]
    ffn |= {"anyOf": [{"enum": [*FFN_PRESETS]}, *ffn.pop("oneOf")], "default": "dense"}
    del ffn["discriminator"]
    spectral = schema["$defs"]["SparseFFNConfig"]["properties"]["spectral"]
    kinds, nothing = spectral["anyOf"]
    spectral["anyOf"] = [*kinds["oneOf"], nothing]
    presets = {"ModelConfig": [*SIZES]}
    for name, config in FFN_PRESETS.items():
        presets.setdefault(type(config).__name__, []).append(name)
    for part, names in presets.items():
        preset = {"enum": names, "description": "Gives the keys that are left out."}
        properties = schema["$defs"][part]["properties"]
        schema["$defs"][part]["properties"] = {"preset": preset, **properties}
    return schema


def _part(value: Any) -> str:
    """The class of the section that a value is or may be; "" for none."""
    found = re.search(r'"#/\$defs/(\w+)"', json.dumps(value))
    return found[1] if found else ""


def fill(page: str) -> str:
    """The page with what the schema says of a section, such as BatchConfig, between the marks
    `<!-- BatchConfig -->` and `<!-- end -->`."""
    schema = _schema()
    parts = {"RunConfig": schema, **schema["$defs"]}

    def summary(part: str) -> str:
        return str(parts[part]["description"]).partition("\n\n")[0].replace("\n", " ")

    def table(mark: re.Match[str]) -> str:
        part = parts[mark[1]]
        lines = [f"<!-- {mark[1]} -->", summary(mark[1]), "", "| key | value | default | meaning |"]
        lines.append("|---|---|---|---|")
        for key, value in part["properties"].items():
            default = json.dumps(value.get("default", "")).strip('"')
            cell = f"`{default}`" if default and default[:2] != '{"' else ""  # a section has none
            cell = "required" if key in part.get("required", ()) else cell
            meaning = value.get("description", "").replace("\n", " ") or summary(_part(value))
            lines.append(f"| `{key}` | {_values(key, value)} | {cell} | {meaning} |")
        text = "\n".join([*lines, "<!-- end -->"])
        return re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", text)

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def _values(key: str, value: Any) -> str:
    """What may stand at a key, in words; a section has the key for its heading."""
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_values(key, one) for one in value["anyOf"]))
    if "$ref" in value:
        return f"[section](#{key})"
    if "enum" in value or "const" in value:
        return ", ".join(f"`{one}`" for one in value.get("enum") or [value["const"]])
    kind = value["type"] if isinstance(value["type"], str) else value["type"][0]
    if kind == "object":
        inner = value["additionalProperties"]
        return "mapping" if inner is True else f"mapping of names to {_values(key, inner)}"
    if kind == "array":
        items = [_values(key, one) for one in value.get("prefixItems") or [value["items"]]]
        if "prefixItems" not in value:
            items = [items[0].replace("`, `", "` or `"), "…"]
        return f"[{', '.join(items)}]"
    bounds = (f"{sign} {_number(value[bound])}" for bound, sign in _SIGNS.items() if bound in value)
    return f"{kind} {' and '.join(bounds)}".rstrip()


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(fill(file.read_text(encoding="utf-8")), encoding="utf-8")
