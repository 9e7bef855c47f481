"""Makes the virtual environment that the peers run in: TRL 1.16, and of TRL 1.12 what its PPO needs.

    python benchmarks/peers/install.py

It is `benchmarks/peers/.venv`, and touches no other environment. torch is the version that rlhf_ray is tested with, the
other packages are held to constraints.txt where it names them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ENVIRONMENT = FOLDER / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"
OLD_TRL = ENVIRONMENT / "trl-1.12"
"""TRL 1.12 alone, which comes before 1.16 on the path of its own benchmark."""
PACKAGES = ("torch==2.13.0", "trl==1.16.*", "pandas", "rich")


def main() -> None:
    """Installs what is missing."""
    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    lines = (FOLDER.parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = ENVIRONMENT / "constraints.txt"
    constraints.write_text("\n".join(line for line in lines if not line.startswith("trl==")) + "\n", encoding="utf-8")
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--constraint", str(constraints), *PACKAGES], check=True)
    subprocess.run([*pip, "--no-deps", "--upgrade", "--target", str(OLD_TRL), "trl==1.12.0"], check=True)
    print(f"ready: {PYTHON}")


if __name__ == "__main__":
    main()
