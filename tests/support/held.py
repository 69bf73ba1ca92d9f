"""Processes of a user that a snapshot holds (held.rs). `held.py MODE UID …` says `up` when it is ready; a line on its standard input is an
order, and each order has one line as its answer. Started as root, it becomes the user by itself."""
import ctypes, json, os, pty, select, signal, sys, threading, time

mode, uid, *rest = sys.argv[1:]
uid = int(uid)
# Of these there is no handler: the first two by nature, the others are the C library's own.
SIGNALS = [number for number in range(1, 65) if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33)]
REAL_TIME = [number for number in SIGNALS if number >= 34]


def become():
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def say(value="up"):
    print(json.dumps(value), flush=True)


def orders():
    return iter(sys.stdin.readline, "")


class Chain:
    """Three files that get the numbers from 1 on, one after the other: at any instant they are n, or the first ones n and the others n - 1."""

    def __init__(self, folder, name):
        self.files = [os.open(f"{folder}/{at}/{name}", os.O_RDWR | os.O_CREAT, 0o666) for at in "amz"]

    def step(self):
        number = int(os.pread(self.files[0], 16, 0) or 0) + 1
        for file in self.files:
            os.pwrite(file, b"%015d\n" % number, 0)


def forever(work):
    say()
    while True:
        work()


def writer(folder, name, title=""):
    become()
    libc = ctypes.CDLL(None)
    if title:
        assert libc.prctl(15, bytes.fromhex(title), 0, 0, 0) == 0  # PR_SET_NAME
    forever(Chain(folder, name).step)


def saved(folder, name):
    """Root, who could become the user again: only the saved id is the user's."""
    os.setresuid(0, 0, uid)
    forever(Chain(folder, name).step)


def forkchain(folder, name):
    """Each process leaves a child in its place and ends. Standard output goes first: whoever reads it would wait for all of them."""
    become()
    chain = Chain(folder, name)
    say()
    null = os.open("/dev/null", os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    end = time.monotonic() + 120
    while time.monotonic() < end:
        chain.step()
        if os.fork():
            os._exit(0)


def births(folder, name):
    """Each number is written by a thread or a process that was born for it."""
    become()
    chain = Chain(folder, name)

    def work():
        thread = threading.Thread(target=chain.step)
        thread.start()
        thread.join()
        child = os.fork()
        if child == 0:
            chain.step()
            os._exit(0)
        os.waitpid(child, 0)

    forever(work)


def sleepers(count):
    become()
    for _ in range(int(count)):
        if os.fork() == 0:
            while True:
                signal.pause()
    say()
    signal.pause()


def stopped():
    become()
    say()
    os.kill(os.getpid(), signal.SIGSTOP)
    signal.pause()


def vfork(fifo):
    """Waits in vfork(2) until somebody writes to the pipe: the child opens it before it executes a program."""
    become()
    say()
    child = os.posix_spawn("/bin/true", ["true"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, fifo, os.O_RDONLY, 0)])
    os.waitpid(child, 0)
    say("returned")
    signal.pause()


def terminal(typed, *command):
    """A program on a terminal of its own, in which `typed` starts a job that answers each line."""
    child, master = pty.fork()
    if child == 0:
        become()
        os.chdir("/")
        os.execvpe(command[0], command, {"PATH": os.environ["PATH"], "HOME": "/", "TERM": "xterm", "PS1": "$ ", "TMUX_TMPDIR": os.environ.get("TMUX_TMPDIR", "")})
    text = b""

    def answered(number, patience):
        nonlocal text
        end = time.monotonic() + patience
        while f"got:ping-{number}".encode() not in text:
            if not select.select([master], [], [], max(0, end - time.monotonic()))[0]:
                return False
            text += os.read(master, 65536)
        return True

    os.write(master, f"{typed}\n".encode() if typed else b"")
    # Programs take their time to start, and some forget what was typed before that.
    for number in range(1000, 1100):
        os.write(master, f"ping-{number}\n".encode())
        if answered(number, 0.3):
            break
    say()
    for order in orders():
        text = b""
        os.write(master, f"ping-{order.strip()}\n".encode())
        is_answered = answered(order.strip(), 20)
        say({"isAnswered": is_answered, "text": text.decode(errors="replace")})


def signals():
    """Counts the signals that arrive, by number."""
    become()
    reader, end = os.pipe()
    os.set_blocking(end, False)
    signal.set_wakeup_fd(end)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    counts = {}
    say()
    while True:
        # Read at once: Python hangs in a handler that finds the pipe full.
        ready = select.select([0, reader], [], [])[0]
        if reader in ready:
            for number in os.read(reader, 65536):
                counts[number] = counts.get(number, 0) + 1
        elif not os.read(0, 100):
            return
        else:
            say(counts)


def send(pid):
    """Sends every signal, and those of real time three times, as they are queued; SIGCONT is not, as SIGTSTP takes it back while it is
    pending (signal(7)). Answers with what it sent."""
    say()
    sent = sorted(set(SIGNALS) - {signal.SIGCONT}) + REAL_TIME + REAL_TIME
    for _ in orders():
        for number in sent:
            os.kill(int(pid), number)
        say(sent)


def stream(pid):
    """Sends signals of real time without a rest until it hears an order; answers with how many it sent."""
    say()
    count = 0
    while not select.select([sys.stdin], [], [], 0.0001)[0]:
        try:
            os.kill(int(pid), REAL_TIME[count % len(REAL_TIME)])
            count += 1
        except BlockingIOError:
            pass  # its queue is full
    say(count)
    signal.pause()


def continuer(pid):
    say()
    while True:
        os.kill(int(pid), signal.SIGCONT)


def end():
    """Every process of the user. Several times: some fork meanwhile."""
    become()
    for _ in range(100):
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            break


globals()[mode](*rest)
