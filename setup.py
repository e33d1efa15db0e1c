"""What pyproject.toml cannot express: ``kernels/`` is installed as ``curvopt.kernels``; README for an index page."""

import re
from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
LOCAL = r"\((?!https?:|#)[^)]*\)"  # relative targets: they lead nowhere on an index page

setup(
    packages=[*find_packages(include=["curvopt", "curvopt.*"]), "curvopt.kernels"],
    package_dir={"curvopt": "curvopt", "curvopt.kernels": "kernels"},
    long_description=re.sub(rf"\[([^\]]*)\]{LOCAL}", r"\1", re.sub(rf"!\[[^\]]*\]{LOCAL}\n*", "", README)),
    long_description_content_type="text/markdown",
)
