"""The ollama command, of the server's own version."""

import os
import re
import subprocess

from record import BASE_URL, PROMPT, TINY, UNKNOWN, done, ok, plain, refused

MODELFILE = f"""FROM {TINY}
PARAMETER temperature 0
PARAMETER seed 1
PARAMETER num_predict 8
SYSTEM Be brief.
"""
# Uploaded as a blob: no model of the server has this file.
MODELFILE_GGUF = f"FROM {os.environ['CLIENT_GGUF']}\nPARAMETER num_predict 8\n"

for name, text in (("Modelfile", MODELFILE), ("Modelfile.gguf", MODELFILE_GGUF), ("Modelfile.bad", "FORM nothing\n")):
    with open(name, "w") as f:
        f.write(text)


def ollama(*args, stdin=""):
    env = {**os.environ, "OLLAMA_HOST": BASE_URL, "OLLAMA_CREATE_REMOTE": "1"}
    run = subprocess.run(
        [os.environ["CLIENT_OLLAMA"], *args], input=stdin, capture_output=True, text=True, env=env, timeout=120
    )
    # Terminal codes, and progress that is overwritten, differ from run to run.
    message = re.sub(r"\x1b\[[0-9?;]*[A-Za-z]", "", run.stderr).strip().splitlines()
    if run.returncode != 0:
        raise OSError(f"status {run.returncode}: {message[-1:]}")
    return run.stdout


def table(*args):
    """A table without its last column, a time, and whether that is a day if the column is UNTIL."""
    lines = ollama(*args).splitlines()
    end = max(lines[0].find("MODIFIED"), lines[0].find("UNTIL"))
    return sorted(line[:end].rstrip() for line in lines)


ok("version", lambda: [l for l in ollama("--version").splitlines() if "Warning" not in l])
ok("list", lambda: table("list"))
ok("show", lambda: ollama("show", TINY))
ok("show modelfile", lambda: re.sub(r"FROM /\S+", "FROM blob", ollama("show", "--template", TINY)))
ok("create", lambda: ollama("create", "command-made", "-f", "Modelfile"))
ok("create from gguf", lambda: ollama("create", "command-gguf", "-f", "Modelfile.gguf"))
ok("list created", lambda: table("list"))
ok("show created", lambda: ollama("show", "command-made"))
ok("run", lambda: ollama("run", "command-made", PROMPT))
ok("run stdin", lambda: ollama("run", "command-made", stdin=PROMPT))
ok("run json", lambda: ollama("run", "command-made", "--format", "json", PROMPT))
ok("run verbose", lambda: ollama("run", "command-made", "--verbose", PROMPT))
ok("ps", lambda: table("ps"))
ok("stop", lambda: ollama("stop", "command-made"))
ok("cp", lambda: ollama("cp", "command-made", "command-copied"))
ok("run copy", lambda: ollama("run", "command-copied", PROMPT))
ok("stop copy", lambda: ollama("stop", "command-copied"))
ok("rm", lambda: ollama("rm", "command-made", "command-copied", "command-gguf"))
ok("list at last", lambda: table("list"))
refused("run unknown", lambda: ollama("run", UNKNOWN, PROMPT))
refused("show unknown", lambda: ollama("show", UNKNOWN))
refused("rm unknown", lambda: ollama("rm", UNKNOWN))
refused("cp unknown", lambda: ollama("cp", UNKNOWN, "command-copied"))
refused("create bad", lambda: ollama("create", "command-bad", "-f", "Modelfile.bad"))
# The model that stays loaded.
ok("run last", lambda: bool(ollama("run", TINY, PROMPT)))
done()
