"""Write `deploy/.env` for `deploy/compose.yaml`: what is random is made up, the rest is yours.

Run again, it adds what a newer release wants, fills in what is empty, and changes nothing else.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from stack import KEYS_EXPIRE_AT, PROJECT, sign_jwt

DEPLOY = PROJECT / "deploy"
RANDOM = (
    "POSTGRES_PASSWORD",
    "AUTHENTICATOR_PASSWORD",
    "AUTH_ADMIN_PASSWORD",
    "STORAGE_ADMIN_PASSWORD",
    "WORKER_PASSWORD",
    "JWT_SECRET",
)
KEYS = {"ANON_KEY": "anon", "SERVICE_ROLE_KEY": "service_role"}


def fill(text: str) -> str:
    """Return the file with a value for every empty variable that can be made up."""
    lines, secret = text.splitlines(), ""
    for at, line in enumerate(lines):
        name, _, value = line.partition("=")
        if name in RANDOM and not value:
            value = secrets.token_hex(24)  # goes into addresses as it is
        if name in KEYS and not value:
            claims = {"iss": "darkroom", "role": KEYS[name], "exp": KEYS_EXPIRE_AT}
            value = sign_jwt(secret, claims)
        secret = value if name == "JWT_SECRET" else secret
        if name in RANDOM or name in KEYS:
            lines[at] = f"{name}={value}"
    return "\n".join(lines) + "\n"


def main(folder: Path = DEPLOY) -> None:
    """Write the file, readable by its owner alone, and name what is still empty."""
    file, example = folder / ".env", (DEPLOY / ".env.example").read_text()
    text = file.read_text() if file.exists() else example
    given = re.findall(r"(?m)^(\w+)=", text)
    wanted = re.findall(r"(?m)^((\w+)=.*)$", example)
    text = fill(text + "".join(f"{line}\n" for line, name in wanted if name not in given))
    file.touch(mode=0o600)
    file.chmod(0o600)  # it may have been there, copied from the example
    file.write_text(text)
    empty = [line[:-1] for line in text.splitlines() if line.endswith("=")]
    print(f"{file}: {'yours to fill in: ' + ', '.join(empty) if empty else 'complete'}")


if __name__ == "__main__":
    main()
