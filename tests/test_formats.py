"""Text and values of strangers: shown as they are, and never as anything else."""

import pytest

from linearize.formats import each_string, markdown, plain, quoted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\u202eb", "a\\u202eb"),
        ("a\nb\r\t", "a\\nb\\r\\t"),
        ("half \ud800", "half \\ud800"),
        ("\x9b2J\u2028", "\\x9b2J\\u2028"),
        ("Modèle 模型 👩\u200d🔬 \u00a0", "Modèle 模型 👩\u200d🔬 \u00a0"),
        ("[red]x[/red]", "[red]x[/red]"),
    ],
)
def test_plain(text: str, shown: str) -> None:
    assert plain(text) == shown
    assert plain(text, lines=True).isprintable() or "\n" in text or "\u00a0" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a | b\n| c", r"a \| b\\n\| c"),
        ("<script> &lt;", "&lt;script&gt; &amp;lt;"),
        ("[x](http://y) `z` *b*", r"\[x\](http://y) \`z\` \*b\*"),
        ("embedded_arc_easy (acc)", "embedded_arc_easy (acc)"),
        ("_a_ $b$ ~~c~~", r"\_a\_ \$b\$ \~\~c\~\~"),
    ],
)
def test_markdown(text: str, shown: str) -> None:
    assert markdown(text) == shown


def test_quoted_is_short_whatever_the_value() -> None:
    bomb: list = []
    for _ in range(60):
        bomb = [bomb] * 9
    for value in ("x" * 10**6, 16**100_000, {"a": ["y" * 999] * 99}, bomb, [16**99_999], b"z" * 999):
        assert 0 < len(quoted(value)) <= 200
    assert quoted("org/model") == "'org/model'" and quoted({"keep": [1]}) == "{'keep': [1]}"


def test_each_string_changes_keys_and_values() -> None:
    assert each_string({"a": ["b", 1, None, {"c": "d"}]}, str.upper) == {"A": ["B", 1, None, {"C": "D"}]}
