//! `inspect`: reports a stream as complete only if a guest can be restored from it, and a log only if it is one, with
//! bounded memory.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};
use twox_hash::XxHash3_64;
use vhost_migrate::abi::virtio::PackedDesc;
use vhost_migrate::dirty::Log;
use vhost_migrate::inflight::{InflightRegion, RingKind};
use vhost_migrate::memory::{GuestAddress, LOG_PAGE};
use vhost_migrate::ring::RingBase;
use vhost_migrate::stream::{FrameKind, MigrationId, PageStats, RegionLayout};
use vhost_migrate::unstable::stream::frame::{ChannelId, ConnectionHeader, FrameWriter};
use vhost_migrate::unstable::stream::record::{Commit, MemoryLayout, RoundEnd, ToDestination};
use zerocopy::FromZeros;

fn inspect(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vhost-migrate")).arg("inspect").args(arguments).output().unwrap()
}

/// Runs `inspect` with little more address space than the program needs.
fn inspect_in_little_memory(arguments: &[&str]) -> Output {
    const KIB: u32 = 64 << 10;
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit -v {KIB}; exec \"$0\" inspect \"$@\"")]);
    command.arg(env!("CARGO_BIN_EXE_vhost-migrate")).args(arguments).output().unwrap()
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn expect_success(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", words(output)))
}

struct TempFolder(tempfile::TempDir);

impl TempFolder {
    fn new() -> TempFolder {
        TempFolder(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, contents: &[u8]) -> String {
        let path = self.path(name);
        fs::write(&path, contents).unwrap();
        path.to_str().unwrap().into()
    }

    /// Creates a sparse file of zeros.
    fn zeros(&self, name: &str, bytes: u64) -> String {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path.to_str().unwrap().into()
    }
}

const HEADER: ConnectionHeader = ConnectionHeader { one_way: true, ..ConnectionHeader::new(MigrationId(7)) };

/// A frame of a saved stream.
#[derive(Clone)]
enum Frame {
    Message(ToDestination),
    /// One data page.
    Page(u64),
}

fn layout() -> Frame {
    Frame::Message(ToDestination::Layout(MemoryLayout {
        regions: vec![RegionLayout { gpa: GuestAddress(0), size: 8 * LOG_PAGE }],
    }))
}

fn round(round: u32, last: bool, data_pages: u64) -> Frame {
    let sent = PageStats { data_pages, ..PageStats::default() };
    Frame::Message(ToDestination::RoundEnd(RoundEnd::new(round, last, &sent)))
}

fn state(bytes: usize) -> Frame {
    Frame::Message(ToDestination::State(vec![7; bytes]))
}

/// Returns a stream from which a guest can be restored.
fn complete_stream() -> Vec<Frame> {
    let commit = Frame::Message(ToDestination::Commit(Commit { run: true }));
    vec![
        layout(),
        Frame::Page(3),
        Frame::Page(7),
        round(0, false, 2),
        Frame::Page(3),
        round(1, true, 1),
        state(9),
        commit,
    ]
}

fn stream(header: ConnectionHeader, frames: &[Frame]) -> Vec<u8> {
    let mut writer = FrameWriter::new(Vec::new(), ChannelId { migration: header.id, channel: header.channel });
    for frame in frames {
        match frame {
            Frame::Message(message) => message.write(&mut writer).unwrap(),
            Frame::Page(page) => {
                let mut table = [1u32.to_le_bytes(), [0; 4]].concat();
                table.extend(page.to_le_bytes());
                writer.write(FrameKind::Pages, [&table, &[1; LOG_PAGE as usize]]).unwrap()
            }
        };
    }
    [header.encode().to_vec(), writer.into_inner()].concat()
}

#[test]
fn inspect_stream_requires_every_frame_that_a_restore_needs() {
    let folder = TempFolder::new();
    let good = folder.file("good", &stream(HEADER, &complete_stream()));
    let output = inspect(&["--json", "stream", &good]);
    assert_eq!(output.status.code(), Some(0), "{}", words(&output));
    let told = expect_success(&output);
    assert_eq!(
        (&told["committed"], &told["data_pages"], &told["frames"]),
        (&json!(true), &json!(3), &json!(8)),
        "{told}"
    );

    let refused = |what: &str, header, frames: &[Frame], hint: &str| {
        let file = folder.file("bad", &stream(header, frames));
        let output = inspect(&["stream", &file]);
        let told = words(&output);
        assert!(output.status.code() == Some(1) && told.contains(hint), "{what}: {told}");
        assert!(!told.contains("complete"), "{what}: {told}");
    };
    let without = |gone: usize| {
        let mut frames = complete_stream();
        frames.remove(gone);
        frames
    };
    for end in 0..complete_stream().len() {
        refused("an end", HEADER, &complete_stream()[..end], "it ends without a");
    }
    let commit = complete_stream().pop().unwrap();
    refused("a commit alone", HEADER, std::slice::from_ref(&commit), "memory layout is missing");
    refused("no pages", HEADER, &[layout(), state(1), commit.clone()], "end of the last round is missing");
    refused("no layout", HEADER, &without(0), "memory layout is missing");
    refused("a page lost", HEADER, &without(1), "pages came");
    refused("no last round", HEADER, &without(5), "end of the last round is missing");
    refused("no state", HEADER, &without(6), "state is missing");
    let mut outside = complete_stream();
    outside[1] = Frame::Page(8);
    refused("a page outside", HEADER, &outside, "not all in guest memory");
    let mut cancelled = complete_stream();
    cancelled[7] = Frame::Message(ToDestination::Cancel { reason: "not today".into() });
    refused("cancelled", HEADER, &cancelled, "not today");
    refused("one of two channels", ConnectionHeader { channels: 2, ..HEADER }, &complete_stream(), "one of 2 channels");

    // Like on a device with older data.
    let longer = folder.file("longer", &[stream(HEADER, &complete_stream()), vec![9; 1000]].concat());
    let output = inspect(&["--json", "stream", &longer]);
    assert_eq!(
        (output.status.code(), &expect_success(&output)["bytes_after"]),
        (Some(0), &json!(1000)),
        "{}",
        words(&output)
    );
    let mut unfinished = stream(HEADER, &complete_stream());
    unfinished[..40].copy_from_slice(&HEADER.encode_unfinished());
    let output = inspect(&["stream", &folder.file("unfinished", &unfinished)]);
    assert!(output.status.code() == Some(1) && words(&output).contains("is incomplete"), "{}", words(&output));
}

#[test]
fn inspect_uses_bounded_memory_for_any_file() {
    let folder = TempFolder::new();
    // Every second page: the maximum number of runs.
    let log = folder.file("log", &vec![0x55; 64 << 20]);
    let output = inspect_in_little_memory(&["--json", "log", &log, "--memory", "2TiB"]);
    assert_eq!(output.status.code(), Some(0), "{}", words(&output));
    assert_eq!(expect_success(&output)["runs"], 256 << 20);
    assert_eq!(expect_success(&output)["first"].as_array().unwrap().len(), 20);

    let huge = folder.zeros("huge", 1 << 30);
    assert_eq!(inspect_in_little_memory(&["log", &huge, "--memory", "1GiB"]).status.code(), Some(0));
    for kind in ["log", "inflight", "stream"] {
        let output = inspect_in_little_memory(&[kind, "/dev/zero"]);
        let told = words(&output);
        assert!(output.status.code() == Some(1) && told.contains("no end"), "{kind}: {told}");
    }
    let output = inspect_in_little_memory(&["inflight", &huge, "--queues", "256", "--queue-size", "32768"]);
    assert_eq!(output.status.code(), Some(0), "a fresh region: {}", words(&output));

    let mut frames = complete_stream();
    frames[6] = state(64 << 20);
    let many = (1..20_000).map(|number| round(number, false, 0));
    frames.splice(4..4, many);
    let path = folder.file("stream", &stream(HEADER, &frames));
    File::options().write(true).open(&path).unwrap().set_len(1 << 30).unwrap();
    let output = inspect_in_little_memory(&["--json", "stream", &path]);
    assert_eq!(output.status.code(), Some(0), "{}", words(&output));
    assert_eq!(expect_success(&output)["state_bytes"], 64 << 20);
}

#[test]
fn inspect_log_identifies_other_formats_and_reports_doubt() {
    let folder = TempFolder::new();
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    for (file, hint) in [
        (folder.file("empty", b""), "empty"),
        (folder.file("text", b"some notes\nof mine\n"), "text"),
        (manifest.to_str().unwrap().into(), "text"),
        (env!("CARGO_BIN_EXE_vhost-migrate").into(), "a program"),
        (folder.file("stream", &stream(HEADER, &complete_stream())), "inspect stream"),
        (folder.file("image", b"QFI\xfb\0\0\0\x03 and so on"), "qcow2"),
    ] {
        let output = inspect(&["log", &file]);
        let told = words(&output);
        assert!(output.status.code() == Some(1) && told.contains(hint), "{file}: {told}");
    }

    // Arbitrary bits: shown, but not reported as a log.
    let file = folder.file("bits", &[0b0000_0110, 0, 0x80, 0, 0, 0, 0, 0]);
    let output = inspect(&["--json", "log", &file]);
    assert_eq!(output.status.code(), Some(4), "{}", words(&output));
    assert!(words(&output).contains("can't be told") && words(&output).contains("--memory"), "{}", words(&output));
    let told = expect_success(&output);
    assert_eq!((&told["pages"], &told["is_log"]), (&json!(3), &json!(false)), "{told}");
    let output = inspect(&["--json", "log", &file, "--memory", "256KiB"]);
    assert_eq!(
        (output.status.code(), &expect_success(&output)["is_log"]),
        (Some(0), &json!(true)),
        "{}",
        words(&output)
    );
    let beyond = inspect(&["log", &file, "--memory", "64KiB"]);
    assert!(beyond.status.code() == Some(1) && words(&beyond).contains("it marks 0x17000"), "{}", words(&beyond));
    let short = inspect(&["log", &file, "--memory", "1GiB"]);
    assert!(short.status.code() == Some(1) && words(&short).contains("it ends at"), "{}", words(&short));

    // The log of a front-end is identified by its memfd.
    let (log, fd) = Log::create(GuestAddress(1 << 30)).unwrap();
    log.mark(GuestAddress(0x5000), 1);
    let output = inspect(&["--json", "log", &format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd())]);
    assert_eq!(output.status.code(), Some(0), "{}", words(&output));
    assert_eq!(expect_success(&output)["first"], json!([{"gpa": 0x5000, "pages": 1}]));
}

#[test]
fn inspect_inflight_limits_the_listed_requests() {
    const ENTRIES: u16 = 1024;
    let folder = TempFolder::new();
    let mut file = File::create(folder.path("region")).unwrap();
    let mut header = [0u8; 16];
    header[8..10].copy_from_slice(&1u16.to_le_bytes());
    header[10..12].copy_from_slice(&ENTRIES.to_le_bytes());
    file.write_all(&header).unwrap();
    for counter in 0..u64::from(ENTRIES) {
        file.write_all(&[1, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        file.write_all(&counter.to_le_bytes()).unwrap();
    }
    file.seek(SeekFrom::End(0)).unwrap();
    file.set_len(64 << 10).unwrap();
    let path = folder.path("region");
    let output = inspect(&["--json", "inflight", path.to_str().unwrap(), "--requests", "3"]);
    let told = expect_success(&output);
    assert_eq!(told["queues"][0]["in_flight"], ENTRIES, "{told}");
    assert_eq!(told["queues"][0]["resubmit"].as_array().unwrap().len(), 3);
}

/// The log of a VDUSE disk with two queues of 64 entries, as docs/vduse-log.md describes it. Queue 0 has requests in flight.
fn vduse_log(packed: bool) -> Vec<u8> {
    let mut page = vec![0; 4096];
    page[..16].copy_from_slice(b"vduselog\x01\0\x02\0\x40\0\x02\0");
    page[16..32].copy_from_slice(&0x0123_4567_89ab_cdef_0011_2233_4455_6677_u128.to_be_bytes());
    page[32..40].copy_from_slice(&77_u64.to_le_bytes());
    page[40..48].copy_from_slice(&(7_u64 << 32).to_le_bytes());
    page[48..56].copy_from_slice(&(3_u64 << 32 | u64::from(packed) << 34).to_le_bytes());
    page[56..62].copy_from_slice(&[2, 0, 0, 0, 15, 0]);
    page[64..80].copy_from_slice(&5_u128.to_le_bytes());
    page[80..82].copy_from_slice(&[8, 9]);
    page[344..352].copy_from_slice(&[1, 0, 0, 0, 5, 0, 0, 0]);
    let sum = XxHash3_64::oneshot(&page[..4088]);
    page[4088..].copy_from_slice(&sum.to_le_bytes());

    let kind = if packed { RingKind::Packed } else { RingKind::Split };
    let size = InflightRegion::bytes_for(kind, 2, 64).unwrap();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&page).unwrap();
    file.set_len(4096 + size).unwrap();
    let region = InflightRegion::map(kind, file.as_fd(), size, 4096, 2, 64).unwrap();
    if packed {
        let (mut tracker, _) = region.packed(0, 64, RingBase::packed(0, true, 0, true), |_| 0).unwrap();
        tracker.take(&[PackedDesc { id: 9.into(), ..PackedDesc::new_zeroed() }]).unwrap();
    } else {
        let (mut tracker, _) = region.split(0, 64, 0).unwrap();
        [4, 6].into_iter().for_each(|head| tracker.take(head));
    }
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn inspect_vduse_log_prints_the_device_and_its_requests_in_flight() {
    let folder = TempFolder::new();
    for packed in [false, true] {
        let path = folder.file("disk0", &vduse_log(packed));
        let found = expect_success(&inspect(&["--json", "vduse-log", &path]));
        assert_eq!(found["boot_id"], "01234567-89ab-cdef-0011-223344556677");
        assert_eq!((&found["inode"], &found["device_id"], &found["status"]), (&json!(77), &json!(2), &json!(15)));
        assert_eq!((&found["stopped_at"], &found["config"]), (&json!([null, 5]), &json!([8, 9])));
        assert_eq!((&found["queue_size"], &found["suspended"]), (&json!(64), &json!(false)));
        assert_eq!(found["data_id"], "0x5");
        let [first, second] = [0, 1].map(|queue| found["queues"][queue]["resubmit"].clone());
        match packed {
            true => assert_eq!((&first[0]["id"], &first[1]), (&json!(9), &Value::Null)),
            false => assert_eq!((&first[0]["head"], &first[1]["head"]), (&json!(4), &json!(6))),
        }
        assert_eq!(second, json!([]));
        let text = words(&inspect(&["vduse-log", &path]));
        assert!(text.contains("queue 1 is stopped at") && text.contains("VIRTIO_F_VERSION_1"), "{text}");
    }
}

#[test]
fn inspect_vduse_log_refuses_damaged_files() {
    let folder = TempFolder::new();
    let log = vduse_log(false);
    let with = |at: usize, byte: u8| {
        let mut log = log.clone();
        log[at] = byte;
        log
    };
    for (bytes, expected) in [
        (with(0, 0), "does not begin with"),
        (with(8, 2), "version 2, expected 1"),
        (with(60, 0), "checksum is wrong"),
        (with(4096 + 8, 9), "version 9"),
        (log[..4095].to_vec(), "4096 bytes"),
        (log[..4096].to_vec(), "0 bytes"),
        (Vec::new(), "4096 bytes"),
    ] {
        let output = inspect(&["vduse-log", &folder.file("damaged", &bytes)]);
        assert!(output.status.code() == Some(1) && words(&output).contains(expected), "{}", words(&output));
    }
}

#[test]
fn inspect_kernel_lists_each_kind_of_device_or_the_way_to_get_it() {
    let output = inspect(&["--json", "kernel"]);
    assert!(output.status.success(), "{}", words(&output));
    let found = expect_success(&output);
    for (index, module) in ["vhost_net", "vhost_vsock", "vhost_scsi"].into_iter().enumerate() {
        let device = &found["devices"][index];
        assert_eq!(device["module"], module);
        let error = device["error"].as_str().unwrap_or_default();
        let has_advice = error.contains(&format!("modprobe {module}")) || error.contains("run as root");
        assert!(device["usable"] == json!(true) || has_advice, "{device}");
    }
    assert!(
        found["vduse"]["usable"] == json!(true) || found["vduse"]["error"].as_str().unwrap().contains("modprobe vduse")
    );
    assert!(words(&inspect(&["kernel"])).starts_with("Linux "));
}
