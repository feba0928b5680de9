#!/usr/bin/env python3
"""QEMU moving the images of the stream bench: a stopped guest, multifd, 2 channels, memory faulted in on both sides; and a
guest of which a quarter is in use, into memory that was never touched.

    benches/stream_qemu.py [MIB] [RUNS]                after `cargo bench --bench stream --no-run`
    benches/stream_qemu.py --untouched [MIB] [RUNS]    only the last row, of a guest of 4096 MiB unless MIB is given

Prints guest GB/s, or the whole migration's milliseconds, medians. Runs of our bench and of QEMU take turns, so that both see
the same machine.
"""
import glob, json, os, re, socket, statistics, subprocess, sys, tempfile, time

ONLY_UNTOUCHED = "--untouched" in sys.argv
NUMBERS = [int(word) for word in sys.argv[1:] if word.isdigit()]
MIB = NUMBERS[0] if NUMBERS else 1024
RUNS = NUMBERS[1] if len(NUMBERS) > 1 else 5
UNTOUCHED = NUMBERS[0] if NUMBERS and ONLY_UNTOUCHED else 4096
IMAGES = ["data", "mix", "zero"]
CASES = [("unix", "none"), ("tcp", "none"), ("unix", "zstd:1")]
BENCHES = [path for path in glob.glob("target/release/deps/stream-*") if not path.endswith(".d")]
OURS = max(BENCHES, key=os.path.getmtime)


class Qemu:
    def __init__(self, folder, name, memory, mib, *more):
        path = f"{folder}/{name}.qmp"
        self.process = subprocess.Popen(
            ["qemu-system-x86_64", "-machine", "pc,accel=tcg,memory-backend=m", "-m", f"{mib}M", "-S", "-nodefaults"]
            + ["-display", "none", "-object", f"{memory},id=m,size={mib}M,share=on"]
            + ["-qmp", f"unix:{path},server=on,wait=off", *more]
        )
        self.socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 60
        while self.socket.connect_ex(path):
            assert time.monotonic() < deadline, "QEMU does not start"
            time.sleep(0.05)
        self.file = self.socket.makefile("rw")
        self.file.readline()
        self.ask("qmp_capabilities")

    def ask(self, command, **arguments):
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while True:
            answer = json.loads(self.file.readline())
            if "error" in answer:
                raise RuntimeError(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]

    def prepare(self, codec):
        on = [{"capability": "multifd", "state": True}]
        self.ask("migrate-set-capabilities", capabilities=on)
        self.ask("migrate-set-parameters", **{"multifd-channels": 2, "max-bandwidth": 1 << 40,
                 "multifd-compression": codec.split(":")[0], "multifd-zstd-level": 1})

    def end(self):
        self.process.kill()
        self.process.wait()


def qemu(folder, image, transport, codec, mib=MIB, prealloc="on"):
    source = Qemu(folder, "source", f"memory-backend-file,mem-path={image},prealloc={prealloc}", mib)
    target = Qemu(folder, "target", f"memory-backend-memfd,prealloc={prealloc}", mib, "-incoming", "defer")
    try:
        for side in (source, target):
            side.prepare(codec)
        uri = f"unix:{folder}/stream" if transport == "unix" else "tcp:127.0.0.1:47113"
        target.ask("migrate-incoming", uri=uri)
        source.ask("migrate", uri=uri)
        while (status := source.ask("query-migrate"))["status"] not in ("completed", "failed"):
            time.sleep(0.02)
        assert status["status"] == "completed", status
        return status["total-time"], status["ram"]["transferred"] / 1e6
    finally:
        source.end()
        target.end()


def ours():
    text = subprocess.run([OURS, "--size-mib", str(MIB), "--runs", "1"], capture_output=True, text=True).stdout
    rows = dict(re.findall(r"^\| ([^|]+) \|(.*)\|$", text, re.M))
    names = {("unix", codec): f"unix, {codec}" for codec in ("none", "zstd:1")} | {("tcp", "none"): "tcp loopback, none"}
    figures = {case: [float(cell) for cell in rows[names[case]].split("|")] for case in CASES}
    return figures, rows["MB on the wire, zstd:1"]


def untouched(folder):
    """QEMU reads the holes of its source, which fills them: the image is made anew for each run."""
    size, image = ["--size-mib", str(UNTOUCHED), "--used-mib", str(UNTOUCHED // 4)], f"{folder}/sparse"
    mine, theirs = [], []
    for _ in range(RUNS):
        mine.append(float(subprocess.run([OURS, "--untouched", "1", *size], capture_output=True, check=True).stdout))
        subprocess.run([OURS, "--image", "data", image, *size], check=True)
        theirs.append(qemu(folder, image, "unix", "none", UNTOUCHED, "off")[0])
        os.remove(image)
    a, b = statistics.median(mine), statistics.median(theirs)
    ratio = statistics.median(ours / qemu for ours, qemu in zip(mine, theirs))
    print(f"{UNTOUCHED} MiB, a quarter in use, unix, none: ours {a:.0f} ms, QEMU {b:.0f} ms, median of the runs' ratios {ratio:.2f}x")


def faulted_in(folder):
    for image in IMAGES:
        subprocess.run([OURS, "--image", image, f"{folder}/{image}", "--size-mib", str(MIB)], check=True)
    theirs, mine, wire = {}, {}, {}
    for _ in range(RUNS):
        figures, our_wire = ours()
        for case in CASES:
            for at, image in enumerate(IMAGES):
                ms, wire[case, image] = qemu(folder, f"{folder}/{image}", *case)
                theirs.setdefault((case, image), []).append((MIB << 20) / 1e6 / ms)
                mine.setdefault((case, image), []).append(figures[case][at])
    print(f"guest of {MIB} MiB, medians of {RUNS}, GB/s: ours / QEMU (ratio)")
    for case in CASES:
        cells = []
        for image in IMAGES:
            a, b = statistics.median(mine[case, image]), statistics.median(theirs[case, image])
            cells.append(f"{image} {a:.2f} / {b:.2f} ({a / b:.2f}x)")
        print(", ".join(case), "|", " | ".join(cells))
    print("MB on the wire with zstd:1: ours", our_wire, "QEMU", [round(wire[CASES[2], image]) for image in IMAGES])


with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
    if not ONLY_UNTOUCHED:
        faulted_in(folder)
    untouched(folder)
