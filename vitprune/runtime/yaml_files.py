"""Read and write YAML 1.2 as DVC does: `1e-5` and `010` are numbers, `2:4` is text, a repeated key is an error."""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import CollectionNode, Node

from vitprune.errors import BadInput
from vitprune.runtime.files import read_regular_file

MAX_BYTES = 1 << 20  # 21,841 class names take about 0.4 MiB
MAX_VALUES, MAX_DEPTH = 100_000, 32  # with every alias written out


def load_yaml(path: Path) -> Any:
    """Read a YAML file in bounded time and memory.

    Raises:
        BadInput: it is not a regular file of at most `MAX_BYTES`, not YAML in UTF-8, repeats a key, or has too many or
            too deeply nested values.
        FileNotFoundError: there is no such file.
    """
    try:
        return _parsed(read_regular_file(path, MAX_BYTES).decode("utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise BadInput(f"{path}: not valid YAML ({line}{error.problem or error.context}); correct it") from None
    except Exception as error:  # ruamel.yaml raises various errors of Python for invalid values and directives
        raise BadInput(f"{path}: not valid YAML ({' '.join(str(error).split())[:200]}); correct it") from None


def dump_yaml(value: Any) -> str:
    """Return YAML text that `load_yaml` reads as the same value, with the keys in their order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.allow_unicode = False, True
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.representer.ignore_aliases = lambda _: True
    text = io.StringIO()
    yaml.dump(value, text)
    return text.getvalue()


def _parsed(text: str) -> Any:
    depth = 0
    for number, event in enumerate(YAML(typ="safe").parse(text)):  # the parser is iterative, the composer recursive
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH or number > 2 * MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values, or nested more than {MAX_DEPTH} deep")
    loader, _ = YAML(typ="safe").get_constructor_parser(text)
    node = loader.composer.get_single_node()
    if node is None:
        return None
    if _count(node, {}, 0) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values with its aliases written out")
    return loader.construct_document(node)


def _count(node: Node, known: dict[int, int], depth: int) -> int:
    """Count the values of a node with every alias written out."""
    if depth > MAX_DEPTH:  # also an alias of a node within this node
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if id(node) not in known:
        below = node.value if isinstance(node, CollectionNode) else []
        flat = [part for item in below for part in (item if isinstance(item, tuple) else [item])]
        known[id(node)] = 1 + sum(_count(part, known, depth + 1) for part in flat)
    return known[id(node)]
