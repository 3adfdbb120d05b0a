"""The self-contained modeling file of an export, generated from this repository's own modules.

The sources are joined in order, without their imports of each other, so that an exported model can never
differ from the one that was trained.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE_NAME = "modeling_transnormer.py"
MODULES = (
    "kernels/reference.py",
    "kernels/torch_quadratic.py",
    "kernels/torch_cross_entropy.py",
    "models/operator.py",
    "models/config.py",
    "models/published.py",
    "models/decay.py",
    "models/layers.py",
    "models/attention.py",
    "models/llama.py",
    "models/transnormer.py",
    "models/huggingface.py",
)
HEADER = '''"""TransNormer for Hugging Face transformers, in one file: load it with trust_remote_code=True.

Generated from the modules of the training repository that it names below; nothing here is edited by hand.
"""

from __future__ import annotations

'''


def standalone_source() -> str:
    """Source of the modeling file: each import once, then every module's code in order."""
    imports: dict[str, None] = {}  # ordered
    bodies = []
    defined: dict[str, str] = {}
    for module in MODULES:
        source = (ROOT / module).read_text()
        lines = source.splitlines()
        code_starts = 0
        for node in ast.parse(source).body:
            if isinstance(node, ast.Expr) and code_starts == 0:
                code_starts = node.end_lineno or 0  # the docstring
            elif isinstance(node, ast.Import | ast.ImportFrom):
                code_starts = node.end_lineno or 0
                if not _is_ours(node):
                    imports[ast.unparse(node)] = None
            elif not isinstance(node, ast.Try) and any(map(_is_ours, ast.walk(node))):
                raise ValueError(
                    f"{module}, line {node.lineno}: imports this repository inside a definition."
                )
            for name in _names(node):
                if defined.setdefault(name, module) != module:
                    raise ValueError(f"{name} is defined in both {defined[name]} and {module}: rename one.")
        bodies.append(f"# {module}\n" + "\n".join(lines[code_starts:]).strip("\n") + "\n")
    return HEADER + "\n".join(imports) + "\n\n\n" + "\n\n".join(bodies)


def _is_ours(node: ast.AST) -> bool:
    """An import of another of the joined modules, or of the future, which the header has."""
    module = node.module if isinstance(node, ast.ImportFrom) else None
    return (module or "").split(".")[0] in ("kernels", "models", "__future__")


def _names(node: ast.stmt) -> list[str]:
    """Names that a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []
