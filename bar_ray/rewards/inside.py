"""What runs inside the sandbox, as `python3 -I -S -c <this text>` by a system Python from 3.8 on.

It reads one marshalled request from stdin, lowers its own limits for good, runs the program, calls
its function once per input and writes one JSON line to a private descriptor. It never sees expected
values, so a program that forges the line gains nothing. `json` is not imported: that costs as much
as starting Python.
"""

import marshal
import os
import resource
import sys

try:
    from _json import encode_basestring_ascii as quote
except ImportError:
    from json.encoder import encode_basestring_ascii as quote


def encode(value: object) -> str:
    """JSON of plain data. Subclasses of plain types are written as the plain value they hold."""
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        text = float.__repr__(value)
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(text, text)
    if isinstance(value, (list, tuple)):
        return "[" + ",".join([encode(item) for item in value]) + "]"
    if isinstance(value, dict):
        return "{" + ",".join([encode_key(k) + ":" + encode(v) for k, v in value.items()]) + "}"
    raise TypeError("not plain data: " + type(value).__name__)


def encode_key(key: object) -> str:
    """A key as JSON has it: text, also for numbers."""
    return encode(key) if isinstance(key, str) else quote(encode(key))


def lower_limits(limits: dict) -> None:
    """Set soft and hard limits; a process without privileges cannot raise them again."""
    for name, (soft, hard) in limits.items():
        resource.setrlimit(getattr(resource, name), (soft, hard))
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # when the machine runs out of memory, this goes first
    except OSError:
        pass


def run(request: dict) -> str:
    """The report on one program, as the inside of a JSON object."""
    # A module of its own, so that dataclasses and the like find themselves in sys.modules.
    module = type(sys)("candidate")
    sys.modules["candidate"] = module
    stage = "compile"
    try:
        code = compile(request["program"], "<program>", "exec")
        stage = "load"
        exec(code, module.__dict__)
        stage = "find"
        function = module.__dict__[request["entry_point"]]
    except BaseException as error:
        return '"stage":"' + stage + '","error":' + quote(type(error).__name__)
    calls = []
    for arguments in request["inputs"]:
        try:
            # Encoded at once: a later call must not change what this one returned.
            calls.append("[true," + encode(function(*arguments)) + "]")
        except BaseException as error:
            calls.append("[false," + quote(type(error).__name__) + "]")
    return '"stage":"calls","calls":[' + ",".join(calls) + "]"


def main() -> None:
    """Serve the one request on stdin, then leave without running what the program left behind."""
    with open(0, "rb", closefd=False) as stdin:
        request = marshal.loads(stdin.read())
    report_fd = int(sys.argv[1])
    os.set_inheritable(report_fd, False)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    lower_limits(request.pop("limits"))
    os.write(report_fd, b"+")  # from here on, a failure is the program's own
    report = ('{"id":"' + request.pop("id") + '",' + run(request) + "}\n").encode()
    while report:
        report = report[os.write(report_fd, report) :]
    os._exit(0)


main()
