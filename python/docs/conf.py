"""How Sphinx builds the site; `build.py` runs it."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

sys.path.insert(0, str(Path(__file__).parent))
import docstrings
import mrgptq

project, author, release = "mrgptq", "the authors of mrgptq", mrgptq.build_info()["version"]
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"mrgptq {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = html_show_copyright = False
html_theme_options = {"footer_icons": []}
html_math_renderer = "mathml"
nitpicky = True
smartquotes = False  # values of arguments are to be copied
default_role = "literal"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
maximum_signature_line_length = 100
python_display_short_literal_types = True
python_use_unqualified_type_names = True
suppress_warnings = ["myst.header"]  # a notebook's cells may begin at any level


def process_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A docstring of ours as reStructuredText."""
    lines[:] = docstrings.restructure(lines)


def process_signature(app: Sphinx, what: str, name: str, obj: Any, options: Any, arguments: str | None, result: str | None) -> tuple[str, str] | None:
    """A signature as the source has it."""
    return docstrings.signature(obj) if what in ("class", "function", "method") else None


def find_by_last_name(env: BuildEnvironment, name: str) -> tuple[str, str] | None:
    """(page, anchor) of what the site documents under a name that ends so, where there is one such thing; of several the one nearest to the front door."""
    objects = env.get_domain("py").objects
    found = [full for full in objects if full == name or full.endswith(f".{name}")]
    found = [full for full in found if full.count(".") == min(other.count(".") for other in found)]
    return (objects[found[0]].docname, objects[found[0]].node_id) if len(found) == 1 else None


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> nodes.Node | None:
    """Names as docstrings and annotations write them, without their modules. What the package has but the site does not is shown as it is; what nothing has is an error."""
    target = node.get("reftarget", "").lstrip(".")
    if node.get("refdomain") != "py" or not target:
        return None
    if found := find_by_last_name(env, target):
        return make_refnode(app.builder, node["refdoc"], *found, content, target)
    if "refexplicit" not in node:  # of an annotation, not of a role: NumPy's and the standard library's
        return content
    return content if _exists(target, node.get("py:module")) else None


def _exists(target: str, module: str | None) -> bool:
    names = target.split(".")
    for count in range(len(names), -1, -1):
        for prefix in ("", "mrgptq.", f"{module}."):
            try:
                found: Any = importlib.import_module((prefix + ".".join(names[:count])).rstrip("."))
                for name in names[count:]:
                    found = getattr(found, name)
                return True
            except (ImportError, AttributeError, ValueError):
                continue
    return False


class CodeLinks(SphinxPostTransform):
    """`mg.quantize` in a page's prose leads to its entry."""

    default_priority = 400

    def run(self, **kwargs: Any) -> None:
        """On a page's literals."""
        objects = self.env.get_domain("py").objects
        for literal in list(self.document.findall(nodes.literal)):
            name = re.match(r"(?:mg\.|mrgptq\.|(?=hf\.))([\w.]+)", literal.astext())
            entry = objects.get(f"mrgptq.{name[1]}") if name else None
            if entry and not isinstance(literal.parent, nodes.reference):
                literal.replace_self(make_refnode(self.app.builder, self.env.docname, entry.docname, entry.node_id, literal.deepcopy()))


def visit_math(self: Any, node: nodes.Element) -> None:
    """TeX as MathML, which browsers show without any script."""
    display = isinstance(node, nodes.math_block)
    self.body.append(f"<p>{latex2mathml.tex2mathml(node.astext(), as_block=True)}</p>" if display else latex2mathml.tex2mathml(node.astext()))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("missing-reference", resolve)
    app.add_post_transform(CodeLinks)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
