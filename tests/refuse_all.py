"""Run every command line of a JSON list in this process, with little memory to spare; write a JSON list of how it went.

python refuse_all.py COMMANDS RESULTS, where a command is [tool, argument, …].
"""

import json
import os
import pickle
import resource
import sys
import time
from pathlib import Path

from typer.testing import CliRunner

from hsrgan.tools import import_attributes, import_weights

SPARE = 768 << 20  # bytes


def main(commands: Path, results: Path) -> None:
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (in_use + SPARE,) * 2)
    try:
        pickle.loads(b"\x80\x04Nr\xff\xff\xff\x7f.")  # the limit acts: Python's own reader makes room for 2³² numbers
        limited = False
    except MemoryError:
        limited = True
    rows = []
    for tool, *arguments in json.loads(commands.read_text()):
        start = time.process_time()
        app = {"weights": import_weights.app, "attributes": import_attributes.app}[tool]
        result = CliRunner().invoke(app, arguments)
        failed = repr(result.exception) if isinstance(result.exception, Exception) else None
        rows.append({"code": result.exit_code, "stderr": result.stderr, "failed": failed,
                     "seconds": time.process_time() - start})  # fmt: skip
    results.write_text(json.dumps({"limited": limited, "rows": rows}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
