"""Sphinx, run by ``make docs``. Nothing is fetched to build or to read the site; formulas become MathML."""

import html
import importlib
import pkgutil
import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

import curvopt
import curvopt.analysis
import curvopt.lora

project = "curvopt"
author = copyright = "The curvopt authors"
version = release = curvopt.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
myst_dmath_double_inline = True
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = "curvopt"
html_static_path = ["_static"]
html_css_files = ["extra.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False

# ------------------------------------------------------------------------------------------------- docstrings

default_role = "py:obj"  # single backticks: a link where the name is one of ours, otherwise only code
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
add_module_names = False
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# every reference to a name of the package must resolve; what other projects document is not at hand
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!curvopt\b).*"),
    ("py:.*", r"curvopt\.optim\..*"),
    ("py:.*", r"curvopt\..*\._\w+"),
]

BARS = re.compile(r"(``[^`]*``|`[^`]*`)|(?<!\\)\|")


def plain(app, what, name, obj, options, lines):
    """Read |x| as an absolute value, not a substitution, and an indented paragraph as formulas, not a quotation."""
    out, in_fields, literal = [], False, False
    for i, line in enumerate(lines):
        in_fields = in_fields or line.startswith(":")
        starts = line.startswith("    ") and i > 0 and not lines[i - 1].strip()
        if starts and not literal and not in_fields:
            before = next((earlier for earlier in reversed(lines[:i]) if earlier.strip()), "")
            literal = True  # up to the next line at the margin
            if not before.startswith(("..", "    ", "- ", "* ")) and not before.endswith("::"):
                out += ["::", ""]
        elif line.strip() and not line.startswith(" "):
            literal = False
        out.append(line if literal else BARS.sub(lambda found: found[1] or r"\|", line))
    lines[:] = out


def skip(app, what, name, obj, skipped, options):
    """Leave out what a NamedTuple says of its fields; the class describes them."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


# ------------------------------------------------------------------------------------------------- pages

PACKAGES = (curvopt, curvopt.lora, curvopt.analysis)
PUBLIC = {name: f"{package.__name__}.{name}" for package in PACKAGES for name in package.__all__}
REAL = {  # where an object is defined → where it is documented
    f"{thing.__module__}.{thing.__qualname__}": f"{package.__name__}.{name}"
    for package in PACKAGES
    for name, thing in ((name, getattr(package, name)) for name in package.__all__)
}
TEXT = re.compile(r"(^(?:```|:::).*?^(?:```|:::).*?$|^#.*?$|\[[^\]]*\]\([^)]*\)|\$[^$]+\$)", re.MULTILINE | re.DOTALL)


def follow_imports(app, env, node, contnode):
    """Resolve what an annotation calls by the module that defines it."""
    target = REAL.get(node.get("reftarget"))
    if target is None:
        return None
    return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, contnode)


def list_modules(app, name, source):
    """Replace ``.. modules:: PACKAGE`` by the package and all its public modules, those to come included."""

    def listed(found):
        package = importlib.import_module(found[1])
        names = [found[1], *(f"{found[1]}.{info.name}" for info in pkgutil.iter_modules(package.__path__))]
        return "\n".join(f"{name}\n{'-' * len(name)}\n\n.. automodule:: {name}\n" for name in names if "._" not in name)

    source[0] = re.sub(r"^\.\. modules:: (\S+)$", listed, source[0], flags=re.MULTILINE)


def link_names(app, name, source):
    """Link the first mention of every public name on a page, so that its text can be read without."""
    if name.startswith(("reference/", "changelog")):
        return
    source[0] = re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\.md\)", r"\1", source[0])  # pages of the checkout, not of the site
    left = dict(PUBLIC)
    parts = TEXT.split(source[0])
    for i in range(0, len(parts), 2):  # the others are code, headings, links and formulas
        parts[i] = re.sub(r"(?<![`\w\[])`([A-Za-z_]+)(\(\))?`(?!`)", lambda found: linked(found, left), parts[i])
    source[0] = "".join(parts)


def linked(found, left):
    path = left.pop(found[1], None)
    return found[0] if path is None else f"{{py:obj}}`{found[1]}{found[2] or ''} <{path}>`"


def check_reference(app, env):
    """Warn of a public name that no page of the reference documents."""
    documented = {name for name, *_ in env.domains["py"].get_objects()}
    for path in sorted(set(PUBLIC.values()) - documented):
        logging.getLogger(__name__).warning("%s is public and not in the reference", path)


def mark_numbers(app, tree, name):
    """Mark the tables whose cells are all short, as numbers are: their lines are not broken."""
    for table in tree.findall(nodes.table):
        cells = [entry.astext() for row in table.findall(nodes.row) for entry in list(row.findall(nodes.entry))[1:]]
        if max(map(len, cells), default=0) <= 36:
            table["classes"].append("numbers")


def visit_math(self, node):
    self.body.append(convert(html.unescape(node.astext()), display="inline"))
    raise nodes.SkipNode


def visit_math_block(self, node):
    self.body.append(f'<div class="math">{convert(html.unescape(node.astext()), display="block")}</div>\n')
    raise nodes.SkipNode


def setup(app):
    app.connect("autodoc-process-docstring", plain, priority=900)  # after napoleon
    app.connect("autodoc-skip-member", skip)
    app.connect("missing-reference", follow_imports)
    app.connect("source-read", list_modules)
    app.connect("source-read", link_names)
    app.connect("env-check-consistency", check_reference)
    app.connect("doctree-resolved", mark_numbers)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
