"""Builds the one compiled module; everything else about the package is in pyproject.toml.

SESSIOND_DEBUG=1 builds it for finding bugs: bounds checks, line tracing, C and Python assertions, -O0 -g, and
build/cython/ext/_kernel.html with every line coloured by how much Python it calls. A file's own `# cython:` header
outranks the directives here.
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("SESSIOND_DEBUG", "") not in ("", "0")

# Not optional: a daemon without its core must fail here, not at the first request.
kernel = Extension(
    "sessiond.core._kernel",
    sources=["ext/_kernel.pyx"],
    include_dirs=["ext"],
    extra_compile_args=["-O0", "-g"] if DEBUG else ["-O3"],
    define_macros=[("CYTHON_TRACE_NOGIL", "1")] if DEBUG else [("CYTHON_WITHOUT_ASSERTIONS", "1")],
    undef_macros=["NDEBUG"] if DEBUG else [],
)

setup(
    ext_modules=cythonize(
        [kernel],
        include_path=["ext"],
        build_dir="build/cython",
        language_level=3,
        annotate=DEBUG,
        # Always, so that no build of the other kind is taken for this one.
        force=True,
        # autotestdict would add a name, __test__, that the stub does not have.
        compiler_directives={"autotestdict": False} | ({"boundscheck": True, "linetrace": True} if DEBUG else {}),
    )
)
