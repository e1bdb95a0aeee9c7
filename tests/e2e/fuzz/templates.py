"""Random chat templates: fragments of Jinja, some of them broken, nested in each other."""

from __future__ import annotations

from hypothesis import strategies as st

VALUES = st.sampled_from(
    [
        "messages", "messages[0]", "messages[0]['content']", "messages[0].content", "messages[-1].role", "tools",
        "bos_token", "eos_token", "nothing", "nothing.at.all", "add_generation_prompt", "true", "none", "0", "1.5",
        "'text'", "'\\ud800'", "'ü'", "'a' * 1000", "'a' * 10**9", "10**4400", "[1, 'a', none]", "{'a': 1}", "{}", "[]",
        "range(3)", "range(10**9)", "namespace(x=1)", "loop.index", "self", "caller()", "strftime_now('%Y')",
        "strftime_now('\\ud800')", "strftime_now(1)", "raise_exception('no')", "raise_exception(1)", "cycler('a')",
        "joiner(',')", "lipsum()", "dict(a=1)", "''.__class__", "messages.append", "messages[0].items()", "'%s' % 1",
        "'%n' % 1", "'{}'.format(1)", "'{0.__class__}'.format(1)", "1/0", "-'a'", "f()", "x", "now()", "1 if nothing",
    ]
)  # fmt: skip

FILTERS = st.sampled_from(
    [
        "", "|tojson", "|tojson(indent=2)", "|tojson(indent='x')", "|length", "|join", "|trim", "|upper", "|safe",
        "|first", "|last", "|list", "|int", "|float", "|string", "|items", "|default('d')", "|selectattr('role')",
        "|map('upper')", "|map(attribute='role')|join", "|batch(2)", "|batch(0)", "|groupby('role')", "|sort", "|sum",
        "|reverse", "|round", "|wordwrap(0)", "|indent(-1)", "|center(10**9)", "|truncate(1)", "|xmlattr", "|random",
        "|unknown", "|pprint", "|dictsort", "|slice(0)", "|urlize", "|format(1)", "|replace('a', 'b')", "[5]", ".x.y",
        "[1:]", "()", "('a')", " is defined", " is mapping", " in messages", " is unknown", " == 1", " < 1", " ~ 1",
    ]
)  # fmt: skip

EXPRESSIONS = st.builds("".join, st.tuples(VALUES, FILTERS, FILTERS))

TEXTS = st.one_of(
    st.text(max_size=5),
    st.sampled_from(
        [
            "Hello", "\n", "{{", "}}", "{%", "%}", "{#", "#}", "{% if %}", "{% endfor %}", "{% else %}", "{{ }}", "\0",
            "{%- break %}", "{% continue %}", "{% include 'x' %}", "{% extends 'x' %}", "{% import 'x' as y %}",
            "{% do 1 %}", "{% trans %}", "{% unknown %}", "{{ super() }}", "{% raw %}{{{% endraw %}", "{%-", "-%}",
        ]
    ),
)  # fmt: skip

SHAPES = (
    "{{{{ {0} }}}}",
    "{{% if {0} %}}{1}{{% endif %}}",
    "{{% if {0} %}}{1}{{% else %}}{2}{{% endif %}}",
    "{{% for x in {0} %}}{1}{{% endfor %}}",
    "{{% for x in {0} recursive %}}{{{{ loop(x) }}}}{1}{{% endfor %}}",
    "{{% for x in {0} if x %}}{1}{{% else %}}{2}{{% endfor %}}",
    "{{% for x, y in {0} %}}{1}{{% endfor %}}",
    "{{% set x = {0} %}}{1}",
    "{{% set ns = namespace() %}}{{% set ns.x = {0} %}}{{{{ ns.x }}}}{1}",
    "{{% set x %}}{1}{{% endset %}}{2}",
    "{{% macro f(a={0}) %}}{1}{{% endmacro %}}{{{{ f() }}}}{2}",
    "{{% macro f() %}}{1}{{{{ f() }}}}{{% endmacro %}}{2}",
    "{{% call f({0}) %}}{1}{{% endcall %}}{2}",
    "{{% filter upper %}}{1}{{% endfilter %}}",
    "{{% generation %}}{1}{{% endgeneration %}}",
    "{{% block b %}}{1}{{% endblock %}}",
    "{{% with x = {0} %}}{1}{{% endwith %}}",
    "{{% autoescape {0} %}}{1}{{% endautoescape %}}",
)


def _nested(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds(str.format, st.sampled_from(SHAPES), EXPRESSIONS, inner, inner)


TEMPLATES = st.recursive(TEXTS, _nested, max_leaves=8)
