//! The command with its seccomp filter, as an unprivileged user.

use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use vhost_migrate::abi::virtio::{
    BlkDiscardWriteZeroes, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_F_RING_PACKED, VirtioFeatures,
};
use vhost_migrate::memory::GuestAddress;
use vhost_migrate::ring::Buffer;
use zerocopy::IntoBytes;

use crate::guest::{BASIC, Guest, Ring, header, install_log, negotiate, request_addresses, start_logging, status};
use crate::raw::RawFrontend;
use crate::server::disk_options;

const NOBODY: u32 = 65534;

/// A folder with an image and a copy of the command, owned by the user `nobody`.
struct Nobodys {
    folder: tempfile::TempDir,
}

impl Nobodys {
    fn new() -> Nobodys {
        let folder = tempfile::tempdir().unwrap();
        let options = disk_options(folder.path(), 4 << 20, |_| {});
        // Other users may have no access to the build's own folder.
        let program = folder.path().join("vhost-migrate");
        std::fs::copy(env!("CARGO_BIN_EXE_vhost-migrate"), &program).unwrap();
        // A process that another test has just started may still have the copy open for writing.
        let busy = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ExecutableFileBusy;
        while Command::new(&program).arg("--version").output().is_err_and(|error| busy(&error)) {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        if geteuid().is_root() {
            for path in [folder.path(), &options.image] {
                chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
            }
        }
        std::fs::set_permissions(&options.image, PermissionsExt::from_mode(0o600)).unwrap();
        Nobodys { folder }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().into()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.path("vhost-migrate"));
        command.arg("backend").args(arguments).args(["--socket", &self.path("socket")]).env_remove("RUST_LOG");
        command.current_dir(self.folder.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if geteuid().is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    }

    fn start(&self, arguments: &[&str]) -> Confined<'_> {
        let mut child = self.command(arguments).spawn().unwrap();
        let mut said = [0; 7];
        let _ = child.stdout.as_mut().unwrap().read_exact(&mut said);
        if &said != b"serves " {
            panic!("{:?}", child.wait_with_output());
        }
        Confined { child, home: self }
    }
}

struct Confined<'a> {
    child: Child,
    home: &'a Nobodys,
}

impl Confined<'_> {
    /// The value of a line of `/proc/PID/status`.
    fn status(&self, name: &str) -> String {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().into()
    }

    /// Ends the process by SIGTERM, and asserts that it succeeds and removes its socket.
    fn end(mut self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).unwrap();
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {said}");
        assert!(!Path::new(&self.home.path("socket")).exists(), "the socket is removed at the end");
    }
}

impl Drop for Confined<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Checks every kind of request while logging, and a ring that is stopped and started.
fn assert_disk_works(socket: &str, features: VirtioFeatures) {
    let guest = Guest::new();
    let client = RawFrontend::connect(Path::new(socket));
    let features = features | BASIC | VIRTIO_BLK_F_FLUSH | VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES;
    negotiate(&client, &guest, features);
    let mut ring = Ring::new(&guest, 0, 256, features);
    let mut base = ring.drained_base();
    let _log = install_log(&client, &guest);
    for round in 0..3u8 {
        ring.set_up(&client, &guest, base);
        ring.enable(&client, true);
        start_logging(&client, &guest, features, &mut [&mut ring], GuestAddress(0));
        let data = [0xc0 | round; 8192];
        ring.write(&guest, 0, 64, &data);
        let clear = |kind, slot, sector: u64| {
            let (head, at, range) = request_addresses(slot);
            guest.memory.write(at, &[0xff]).unwrap();
            let wanted = BlkDiscardWriteZeroes { sector: sector.into(), num_sectors: 8.into(), flags: 0.into() };
            guest.memory.write(range, wanted.as_bytes()).unwrap();
            ([header(&guest, head, kind, 0), Buffer { gpa: range, len: 16 }], [Buffer { gpa: at, len: 1 }])
        };
        for (slot, kind, sector) in [(1, VIRTIO_BLK_T_DISCARD, 128), (2, VIRTIO_BLK_T_WRITE_ZEROES, 136)] {
            let (readable, writable) = clear(kind, slot, sector);
            ring.driver.add(&readable, &writable, None).unwrap().unwrap();
        }
        guest.memory.write(request_addresses(3).1, &[0xff]).unwrap();
        let flush = header(&guest, request_addresses(3).0, VIRTIO_BLK_T_FLUSH, 0);
        ring.driver.add(&[flush], &[Buffer { gpa: request_addresses(3).1, len: 1 }], None).unwrap().unwrap();
        ring.serve(4);
        ring.read(&guest, 4, 64, 8192);
        ring.read(&guest, 5, 136, 4096);
        ring.serve(2);
        assert_eq!([0, 1, 2, 3, 4, 5].map(|slot| status(&guest, slot)), [0; 6]);
        assert!(
            guest.bytes(request_addresses(4).2, 8192) == data && guest.bytes(request_addresses(5).2, 4096) == [0; 4096]
        );
        base = client.ring_base(0);
    }
}

#[test]
fn an_unprivileged_sandboxed_process_serves_a_disk() {
    let nobodys = Nobodys::new();
    let image = nobodys.path("image");
    for more in [&[][..], &["--aio", "threads"], &["--direct"], &["--log-level", "debug", "--queues", "4"]] {
        let confined = nobodys.start(&[&["blk", "--image", &image], more].concat());
        assert_eq!([confined.status("Seccomp:"), confined.status("NoNewPrivs:")], ["2", "1"]);
        if geteuid().is_root() {
            assert_eq!(confined.status("CapEff:"), "0000000000000000");
            assert_eq!(confined.status("Uid:"), "65534\t65534\t65534\t65534");
        }
        for features in [VirtioFeatures::empty(), VIRTIO_F_RING_PACKED] {
            assert_disk_works(&nobodys.path("socket"), features);
        }
        let mut written = [0; 512];
        std::fs::File::open(&image).unwrap().read_exact_at(&mut written, 64 * 512).unwrap();
        assert_eq!(written, [0xc2; 512]);
        confined.end();
    }
}

#[test]
fn a_sandboxed_process_serves_a_network_device() {
    let nobodys = Nobodys::new();
    let wire = nobodys.path("wire");
    for arguments in [&["net", "--loopback"][..], &["net", "--pair", &wire]] {
        let confined = nobodys.start(arguments);
        assert_eq!(confined.status("Seccomp:"), "2");
        RawFrontend::connect(Path::new(&nobodys.path("socket"))).wait_until_processed();
        confined.end();
    }
}

#[test]
fn a_sandboxed_process_serves_its_counters() {
    let nobodys = Nobodys::new();
    let (image, place) = (nobodys.path("image"), nobodys.path("metrics"));
    let confined = nobodys.start(&["blk", "--image", &image, "--metrics", &format!("unix:{place}")]);
    assert_disk_works(&nobodys.path("socket"), VirtioFeatures::empty());
    for _ in 0..3 {
        let mut socket = UnixStream::connect(&place).unwrap();
        socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("requests"), "{answer}");
    }
    confined.end();
}

#[test]
fn seccomp_off_installs_no_filter_and_an_unreadable_image_is_reported() {
    let nobodys = Nobodys::new();
    let image = nobodys.path("image");
    for none in [&["--seccomp", "off"][..], &["--no-seccomp"]] {
        let open = nobodys.start(&[&["blk", "--image", &image], none].concat());
        assert_eq!(open.status("Seccomp:"), "0");
        open.end();
    }
    if geteuid().is_root() {
        chown(&image, Some(0), Some(0)).unwrap();
        let output = nobodys.command(&["blk", "--image", &image]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("change its owner or mode"), "{said}");
    }
}
