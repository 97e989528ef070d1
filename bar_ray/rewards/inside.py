"""What runs inside the sandbox, as `python3 -I -S -c <this text>` by a system Python from 3.8 on.

It reads one marshalled request from stdin, lowers its own limits for good, runs the program, calls
its function once per input and writes one JSON line to a private descriptor. It never sees expected
values, so a program that forges the line gains nothing. `json` is not imported: that costs as much
as starting Python.

Tests that are a program themselves run in a second sandbox: there the function they are given asks
the first one for every value. Only values cross, as Python literals of plain data.
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


def literal(value: object) -> str:
    """A Python literal of plain data, which keeps tuples and sets apart from lists."""
    if isinstance(value, float):
        return {"nan": "'nan'", "inf": "1e999", "-inf": "-1e999"}.get(float.__repr__(value)) or (
            float.__repr__(value)
        )
    for kind, left, right in ((list, "[", "]"), (tuple, "(", ",)"), (set, "{", "}")):
        if isinstance(value, kind):
            items = [literal(item) for item in value]
            empty = {list: "[]", tuple: "()", set: "set()"}[kind]
            return left + ",".join(items) + right if items else empty
    if isinstance(value, dict):
        return "{" + ",".join([literal(k) + ":" + literal(v) for k, v in value.items()]) + "}"
    if isinstance(value, (bytes, complex)):
        return (bytes if isinstance(value, bytes) else complex).__repr__(value)
    if value is None or value is True or value is False or isinstance(value, (str, int)):
        return str.__repr__(value) if isinstance(value, str) else repr_of(value)
    raise TypeError("not plain data: " + type(value).__name__)


def repr_of(value: object) -> str:
    if value is None or value is True or value is False:
        return {None: "None", True: "True", False: "False"}[value]
    return int.__repr__(value)


def answer(function, questions, answers) -> None:
    """Serve calls until the asking side is gone: a line of arguments, a line of the result."""
    from ast import literal_eval

    for line in questions:
        try:
            reply = "(True," + literal(function(*literal_eval(line))) + ")"
        except BaseException as error:
            reply = "(False," + str.__repr__(type(error).__name__) + ")"
        answers.write(reply + "\n")
        answers.flush()


def asker(questions, answers):
    """The function that tests are given: it asks the other sandbox."""
    from ast import literal_eval

    def candidate(*arguments):
        questions.write(literal(arguments) + "\n")
        questions.flush()
        line = answers.readline()
        if not line:
            raise RuntimeError("the program has ended")
        worked, value = literal_eval(line)
        if worked is not True:
            raise RuntimeError("the program raised " + str(value))
        return value

    return candidate


def lower_limits(limits: dict) -> None:
    """Set soft and hard limits; a process without privileges cannot raise them again."""
    for name, (soft, hard) in limits.items():
        resource.setrlimit(getattr(resource, name), (soft, hard))
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # when the machine runs out of memory, this goes first
    except OSError:
        pass


def confine(readable: list, seccomp: bytes) -> None:
    """Give up, for good, all files but the readable ones, and what the filter denies.

    This is for machines without bubblewrap. OSError when the kernel refuses a part of it.
    """
    import ctypes
    from struct import pack

    libc = ctypes.CDLL(None, use_errno=True)

    def call(function, *arguments):
        value = function(*arguments)
        if value < 0:
            raise OSError(ctypes.get_errno(), "the kernel refused to confine a program")
        return value

    create, add, restrict = 444, 445, 446  # landlock_*, the same numbers on every CPU
    version = call(libc.syscall, create, None, 0, 1)
    actions = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)  # on files; each is a bit
    size = 8 if version < 4 else 16 if version < 6 else 24  # files; TCP; sockets and signals
    attributes = pack("QQQ", (1 << actions) - 1, 3, 3)[:size]
    rules = call(libc.syscall, create, attributes, len(attributes), 0)
    for path, access in readable:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # gone, or not for this uid anyway
        call(libc.syscall, add, rules, 1, pack("=Qi", access, place), 0)
        os.close(place)
    die_with_parent, no_new_privileges, set_seccomp, by_filter = 1, 38, 22, 2
    call(libc.prctl, die_with_parent, 9, 0, 0, 0)
    call(libc.prctl, no_new_privileges, 1, 0, 0, 0)
    call(libc.syscall, restrict, rules, 0)
    os.close(rules)
    code = ctypes.create_string_buffer(seccomp, len(seccomp))
    program = pack("HxxxxxxP", len(seccomp) // 8, ctypes.addressof(code))
    call(libc.prctl, set_seccomp, by_filter, program, 0, 0)


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
    if "answers" in request:
        with open(request["questions"]) as questions, open(request["answers"], "w") as answers:
            answer(function, questions, answers)
        return '"stage":"calls","calls":[]'
    if "asks" in request:
        with open(request["asks"], "w") as questions, open(request["hears"]) as answers:
            candidate = asker(questions, answers)
            module.__dict__[request["name"]] = candidate  # some tests call it by its name
            return called(function, [[candidate]])
    return called(function, request["inputs"])


def called(function, inputs: list) -> str:
    """The function's value, or its exception, for every list of arguments."""
    calls = []
    for arguments in inputs:
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
    if "readable" in request:
        confine(request.pop("readable"), request.pop("seccomp"))
    os.write(report_fd, b"+")  # from here on, a failure is the program's own
    report = ('{"id":"' + request.pop("id") + '",' + run(request) + "}\n").encode()
    while report:
        report = report[os.write(report_fd, report) :]
    os._exit(0)


main()
