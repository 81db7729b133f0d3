"""Names: how the paths of leaves and the names of pairs are written."""

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile, zip_longest
from typing import Any

import jax

# A name says LoRA where it stands alone or is set off: `lora_x`, `x-lora`, `loraA`, not `flora`.
SAYS_LORA = re.compile(r"(?:^|[/_-])(?i:lora)(?:[/_-]|$)|(?:^|[/_-])lora(?=[AB](?:[/_-]|$))")
MAGNITUDE = "lora_magnitude"  # of DoRA, beside a pair; trained as an ordinary parameter
_REGEX = re.compile(r"\.\*|[|(\[$^\\]")  # what tells a regular expression from a pattern


def path_name(path: Sequence[Any]) -> str:
    """Writes a key path as `layers/0/lora_a`, the same for NNX variables and plain arrays.

    Args:
        path: a key path of `jax.tree_util`.

    Returns:
        The keys joined by `/`. Dots inside dictionary keys separate components too, as in PEFT's
        flat names. The trailing attribute of a Flax variable (`.value`) is left out.

    Example:
        >>> import jax
        >>> tree = {"layers": [{"lora_a": 0.0}], "q.lora_A.weight": 0.0}
        >>> [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        ['layers/0/lora_a', 'q/lora_A/weight']
    """
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return node_name(path)


def node_name(path: Sequence[Any]) -> str:
    """Writes a key path as `path_name`, but for a node that may be an attribute `value` itself.

    Example:
        >>> node_name([jax.tree_util.GetAttrKey("attention"), jax.tree_util.GetAttrKey("value")])
        'attention/value'
    """
    names: list[Any] = []
    for key in path:
        match key:
            case jax.tree_util.DictKey() | jax.tree_util.FlattenedIndexKey():
                names.append(key.key)
            case jax.tree_util.SequenceKey():
                names.append(key.idx)
            case jax.tree_util.GetAttrKey():
                names.append(key.name)
            case _:
                names.append(str(key).strip("."))
    return join_keys(names)


def join_keys(keys: Iterable[Any]) -> str:
    """Joins the keys of a path as every name of a pair is written.

    Example:
        >>> join_keys(["layers", 0, "q.proj"])
        'layers/0/q/proj'
    """
    return "/".join(str(key).replace(".", "/") for key in keys)


def in_words(path: str, whole: str = "the pair at the root") -> str:
    """Writes a path for a message: what is the whole tree has an empty one.

    Args:
        path: the path.
        whole: what to call the whole tree.

    Example:
        >>> in_words("layers/0/q"), in_words(""), in_words("", "the layer")
        ('layers/0/q', 'the pair at the root', 'the layer')
    """
    return path or whole


def listed(names: Iterable[str], most: int = 4) -> str:
    """Writes names into a message, the first of many.

    Example:
        >>> listed("abc"), listed("abcdef")
        ('a, b, c', 'a, b, c, d and 2 more')
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def matched(pattern: str, path: str) -> list[str] | None:
    """Matches a pattern with the tail of a path.

    Args:
        pattern: components separated by `/`, with wildcards `*`.
        path: a leaf's path.

    Returns:
        What stands before the tail, and what each wildcard stands for; None if it does not match.

    Example:
        >>> matched("*_lora_a", "layers/0/q_lora_a")
        ['layers/0/', 'q']
    """
    found = re.fullmatch(_tail_regex(pattern), path)
    return list(found.groups(default="")) if found else None


def lies_under(pattern: str, path: str) -> bool:
    """Says whether a pattern matches the tail of a path, or of one that it lies under.

    Example:
        >>> lies_under("router", "layers/0/router/lora_a")
        True
    """
    return re.fullmatch(_tail_regex(pattern) + "(/.*)?", path) is not None


def require_pattern(what: str, pattern: str) -> None:
    """Raises if a pattern is written as a regular expression, which would match nothing.

    Args:
        what: whose pattern it is, for the message.
        pattern: the pattern.

    Raises:
        ValueError: so it is; the message has the pattern that was meant.

    Example:
        >>> require_pattern("scales_from", "layers/*/q")
    """
    if not _REGEX.search(pattern):
        return
    bare = re.sub(r"^(\.\*/?)+|(/?\.\*)+$", "", pattern.strip("^$")).replace(".*", "*") or "*"
    remedy = "one pattern for each alternative" if _REGEX.search(bare) else repr(bare)
    raise ValueError(
        f"{what}: {pattern!r} is a regular expression. Patterns here name the end of a path, or of"
        f" one above it, and `*` stands for any text between two `/`. Write {remedy}."
    )


def _tail_regex(pattern: str) -> str:
    tail = re.escape(pattern).replace(r"\*", "([^/]+)")
    return f"(.*/)?{tail}"


def pair_name(patterns: tuple[str, str], prefix: str, captures: Sequence[str]) -> str:
    """Names a pair: what the patterns of a and b begin with, up to a word that says LoRA.

    Args:
        patterns: of a and b.
        prefix: what stands before them in the path.
        captures: what their wildcards stand for.

    Returns:
        The name, with what all wildcards stand for.

    Example:
        >>> pair_name(("q/*_lora_a", "q/*_lora_b"), "layers/0", ["w"])
        'layers/0/q/w'
    """
    fill = iter(captures)
    is_common, names = True, [prefix.rstrip("/")]
    for a, b in zip_longest(*(pattern.split("/") for pattern in patterns), fillvalue=""):
        filled = [next(fill) for _ in range(max(a.count("*"), b.count("*")))]
        literal = _common_start(a, b) if is_common else ""
        is_common &= a == b
        said = SAYS_LORA.search(literal)
        head = literal[: said.start()] if said else literal
        names += [_substituted(head, filled).strip("_"), *filled[head.count("*") :]]
    return "/".join(name for name in names if name)


def _common_start(a: str, b: str) -> str:
    same = takewhile(lambda both: both[0] == both[1], zip(a, b, strict=False))
    return "".join(x for x, _ in same)


def _substituted(pattern: str, captures: Sequence[str]) -> str:
    parts = pattern.split("*")
    return "".join(x + y for x, y in zip_longest(parts, captures[: len(parts) - 1], fillvalue=""))
