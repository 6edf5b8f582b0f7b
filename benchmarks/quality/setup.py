"""Make the environment of the peers, apart from the project's own.

> python benchmarks/quality/setup.py

Run it with the Python of the project's environment: torch, SpeechBrain and all
else that is there already is used from there, in the versions that the tests
run with, and only the peers and what they need more is installed, in
benchmarks/quality/.venv.
"""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = HERE / ".venv"
NNCODEC = "nncodec==2.1.3"


def main():
    """Create, link to the project's packages, install."""
    if sys.prefix == sys.base_prefix:
        raise SystemExit(
            "run this with the project's own Python (`make setup` makes it): "
            ".venv/bin/python benchmarks/quality/setup.py"
        )
    venv.create(ENVIRONMENT, with_pip=True)
    python = ENVIRONMENT / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    )
    # A path file puts the project's packages behind the peers' own. What is
    # installed there in editable form has path files, which are not followed.
    link = Path(own.stdout.strip(), "project.pth")
    link.write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    install = [python, "-m", "pip", "install", "--quiet"]
    install += ["-c", ROOT / "constraints.txt", "-r", HERE / "requirements.txt"]
    subprocess.run(install, check=True)
    # It asks for NumPy 1, torchvision and more, which its coder does not need.
    alone = [python, "-m", "pip", "install", "--quiet", "--no-deps", NNCODEC]
    subprocess.run(alone, check=True)
    print(f"Ready: {python} benchmarks/quality/run.py")


if __name__ == "__main__":
    main()
