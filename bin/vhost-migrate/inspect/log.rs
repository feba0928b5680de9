//! `inspect log`: lists the pages marked in a dirty log. A log has no header: a file is identified by excluding other
//! formats, by the name of its memfd, and by the memory that it must cover.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::Path;

use serde_json::{Value, json};
use vhost_migrate::memory::LOG_PAGE;
use vhost_migrate::unstable::stream::frame::MAGIC;

use super::{Inspection, LinePrinter, open};
use crate::units::format_bytes;

/// First bytes of other formats, and their names.
const OTHER_FORMATS: [(&[u8], &str); 8] = [
    (&MAGIC, "a migration stream: use inspect stream"),
    (b"QFI\xfb", "a qcow2 image"),
    (b"\x7fELF", "a program"),
    (b"\x1f\x8b", "compressed by gzip: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: decompress it first"),
    (b"\xfd7zXZ\0", "compressed by xz: decompress it first"),
    (b"PK\x03\x04", "a zip file"),
    (b"QEVM", "a migration stream of QEMU"),
];
/// Number of bytes of a log that are read at once.
const CHUNK_BYTES: usize = 64 << 10;

/// The marked pages of a log, collected byte by byte.
#[derive(Default)]
struct MarkedPages {
    bytes: u64,
    pages: u64,
    runs: u64,
    /// The first runs of marked pages, up to the number to be listed.
    first: Vec<Range<u64>>,
    /// The last page marked.
    last: Option<u64>,
}

impl MarkedPages {
    fn add_bytes(&mut self, piece: &[u8], most: usize) {
        for (word, bytes) in (0..).zip(piece.chunks(8)).filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0)) {
            for (at, byte) in (self.bytes + 8 * word..).zip(bytes) {
                for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
                    self.mark(at * 8 + bit, most);
                }
            }
        }
        self.bytes += piece.len() as u64;
    }

    fn mark(&mut self, page: u64, most: usize) {
        if self.last.is_none_or(|last| last + 1 != page) {
            self.runs += 1;
            if self.first.len() < most {
                self.first.push(page..page);
            }
        }
        if self.runs == self.first.len() as u64
            && let Some(run) = self.first.last_mut()
        {
            run.end = page + 1;
        }
        self.pages += 1;
        self.last = Some(page);
    }
}

pub(super) fn inspect(
    file: &Path,
    most: usize,
    memory: Option<u64>,
    lines: &LinePrinter,
) -> Result<Inspection, String> {
    let with_path = |what: &dyn std::fmt::Display| format!("{}: {what}", file.display());
    let mut bytes = BufReader::with_capacity(CHUNK_BYTES, open(file)?);
    let head = bytes.fill_buf().map_err(|error| with_path(&error))?;
    if let Some(other) = other_format(head) {
        return Err(with_path(&format_args!("this is no log but {other}")));
    }
    let mut marks = MarkedPages::default();
    loop {
        let piece = bytes.fill_buf().map_err(|error| with_path(&error))?;
        let length = piece.len();
        if length == 0 {
            break;
        }
        marks.add_bytes(piece, most);
        bytes.consume(length);
    }
    let covers = marks.bytes.saturating_mul(8 * LOG_PAGE);
    if let Some(memory) = memory {
        let beyond = marks.last.filter(|last| last * LOG_PAGE >= memory);
        if covers < memory {
            return Err(with_path(&format_args!(
                "this is no log of {memory:#x} bytes of memory: it ends at {covers:#x}"
            )));
        }
        if let Some(page) = beyond {
            let gpa = page * LOG_PAGE;
            return Err(with_path(&format_args!("this is no log of {memory:#x} bytes of memory: it marks {gpa:#x}")));
        }
    }
    let MarkedPages { bytes, pages, runs, first, .. } = marks;
    let (reach, dirty) = (format_bytes(covers as f64), pages * LOG_PAGE);
    let size = format_bytes(dirty as f64);
    lines.print(format_args!(
        "{bytes} bytes, for guest memory up to {covers:#x} ({reach}): {pages} pages dirty ({size}) in {runs} runs"
    ));
    for run in &first {
        let (start, end, count) = (run.start * LOG_PAGE, run.end * LOG_PAGE, run.end - run.start);
        lines.print(format_args!("  {start:#014x}..{end:#014x}  {count} pages"));
    }
    if runs > first.len() as u64 {
        lines.print(format_args!("  … {} more runs (--runs {runs})", runs - first.len() as u64));
    }
    let list: Vec<Value> =
        first.iter().map(|run| json!({"gpa": run.start * LOG_PAGE, "pages": run.end - run.start})).collect();
    let doubt = (memory.is_none() && !is_named_log(file)).then(|| {
        with_path(&"whether this is a log can't be told from its bytes. Say how much memory it is for: --memory SIZE")
    });
    let json = json!({
        "log_bytes": bytes, "pages": pages, "bytes": dirty, "runs": runs, "first": list, "is_log": doubt.is_none(),
    });
    Ok(Inspection { json, doubt })
}

/// Returns the name of a file's format by its first bytes; `None` if the file may be a log.
fn other_format(head: &[u8]) -> Option<&'static str> {
    if head.is_empty() {
        return Some("empty");
    }
    let known = OTHER_FORMATS.iter().find(|(magic, _)| head.starts_with(magic));
    known.map(|(_, what)| *what).or_else(|| is_text(head).then_some("text"))
}

/// Returns true for text. The last character may be incomplete.
fn is_text(head: &[u8]) -> bool {
    let valid = match std::str::from_utf8(head) {
        Ok(text) => text,
        Err(error) if error.error_len().is_none() => {
            std::str::from_utf8(head.get(..error.valid_up_to()).unwrap_or_default()).unwrap_or_default()
        }
        Err(_) => return false,
    };
    valid.chars().all(|char| !char.is_control() || char.is_whitespace()) && valid.contains(char::is_whitespace)
}

/// Returns true for the memfds that front-ends create for their logs: `vhost-dirty-log` of this project, `vhost-log` of
/// QEMU.
fn is_named_log(file: &Path) -> bool {
    let named =
        |path: &Path| path.to_str().is_some_and(|name| name.starts_with("/memfd:vhost-") && name.contains("log"));
    std::fs::read_link(file).is_ok_and(|target| named(&target)) && File::open(file).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_continue_across_bytes_and_chunks() {
        let mut marks = MarkedPages::default();
        marks.add_bytes(&[0b1000_0001, 0xff], 2);
        marks.add_bytes(&[0b0000_0011, 0b0000_0001], 2);
        assert_eq!((marks.bytes, marks.pages, marks.runs, marks.last), (4, 13, 3, Some(24)));
        assert_eq!(marks.first, [0..1, 7..18]);
    }
}
