//! Explanations of the rules: the consequence of a violation, and advice for authors and users of a back-end.

use super::rules::Rule;

/// Consequence of a violated rule, the most severe first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Consequence {
    /// Written pages are not marked, or are written after they were sent.
    LosesPages,
    /// Wrong guest memory is read or written.
    Corrupts,
    /// Requests in flight are lost or executed twice.
    LosesRequests,
    /// An invalid message, ring or state crashes the back-end or is accepted.
    Killed,
    /// The driver waits forever.
    Stalls,
    /// The device has other properties after a migration.
    ArrivesChanged,
    /// Some front-ends do not work with the back-end.
    Refused,
}

impl Consequence {
    /// Returns a description.
    pub fn description(self) -> &'static str {
        match self {
            Consequence::LosesPages => "live migration loses pages",
            Consequence::Corrupts => "guest memory is damaged",
            Consequence::LosesRequests => "a restart loses requests",
            Consequence::Killed => "a hostile guest or front-end crashes it",
            Consequence::Stalls => "a guest stalls",
            Consequence::ArrivesChanged => "a device changes in a migration",
            Consequence::Refused => "some front-ends do not work with it",
        }
    }
}

/// Explanation of a rule.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Explanation {
    /// The rule.
    pub rule: Rule,
    /// Consequence of a violation.
    pub consequence: Consequence,
    /// Details of the consequence.
    pub meaning: &'static str,
    /// Advice.
    pub remedy: &'static str,
}

use Consequence::{ArrivesChanged, Corrupts, Killed, LosesPages, LosesRequests, Refused, Stalls};

/// Source of the rules.
const PROTOCOL: &str = include_str!("../../docs/protocol.md");

/// Returns the explanation of a rule.
///
/// ```
/// use vhost_migrate::check::{Rule, explain};
///
/// let rule = explain("l10".parse::<Rule>()?);
/// println!("{}", rule.text());
/// assert!(!rule.remedy.is_empty());
/// # Ok::<(), vhost_migrate::check::NoSuchRule>(())
/// ```
pub fn explain(rule: Rule) -> Explanation {
    let (consequence, meaning, remedy) = match rule {
        Rule::F1 => (
            Refused,
            "A message that arrives in pieces ends the connection. A front-end that writes header and payload separately, or a loaded host, is enough.",
            "Read until header.size bytes of payload have arrived; one recvmsg is not a message.",
        ),
        Rule::F2 => (
            Refused,
            "QEMU and User-mode Linux refuse replies with other flags and close the connection.",
            "Set a reply's flags to 0x5; do not copy them from the request.",
        ),
        Rule::F3 => (
            Refused,
            "A second reply is taken for the reply to the next request: from there on every answer is wrong.",
            "Ignore need-reply for requests that have a reply of their own.",
        ),
        Rule::F4 => (
            Refused,
            "The front-end waits for an acknowledgement that does not come, or takes a message for done that is not.",
            "With REPLY_ACK answer every need-reply with a u64, 0 for success, in the order of the requests.",
        ),
        Rule::F5 => (
            Refused,
            "A newer front-end loses its device with the first request that the back-end does not know. Descriptors that are kept leak.",
            "Answer an unknown request that has need-reply with a non-zero u64, skip others, go on, and close the descriptors that came along.",
        ),
        Rule::F6 => (
            Refused,
            "User-mode Linux pads SET_MEM_TABLE; a back-end that wants the exact size refuses it.",
            "Take every payload that is at least as long as its content.",
        ),
        Rule::F7 => (
            Refused,
            "rust-vmm's front-end waits for 16 bytes and hangs when logging is switched on; others take any length.",
            "Echo the 16 bytes of the request, once.",
        ),
        Rule::F8 => (
            Stalls,
            "User-mode Linux passes sockets and pipes as call fds. If they are not signalled, its driver waits forever.",
            "Write 8 bytes to a call fd, whatever it is, and expect EAGAIN.",
        ),
        Rule::F9 => (
            Killed,
            "A descriptor shared with the peer blocks a thread forever: no further front-end is served, and a signal does not end the process.",
            "Read and write such descriptors with RWF_NOWAIT or MSG_DONTWAIT; take only eventfds as kicks.",
        ),
        Rule::F10 => (
            LosesRequests,
            "A front-end that does not wait for the reply to GET_VRING_BASE does not know the ring's position.",
            "Keep the connection, and do not send anything before the reply has arrived.",
        ),
        Rule::B1 => (
            Stalls,
            "A front-end that does not read its channel, or closes it, stalls the rings or loses the connection.",
            "Write to the channel without blocking, and drop the channel alone when it fails. A second SET_BACKEND_REQ_FD replaces the first.",
        ),
        Rule::B2 => (
            ArrivesChanged,
            "The guest does not notice that a disk has grown or a link is down.",
            "Send CONFIG_CHANGE_MSG after the configuration has changed.",
        ),
        Rule::B3 => (
            Stalls,
            "With in-band notifications a kick or a call is lost: requests are not started, or completions are not seen.",
            "Handle VRING_KICK like the kick fd, also to start a ring, and send VRING_CALL for each batch if there is no call fd.",
        ),
        Rule::B4 => (
            Refused,
            "The front-end expects a host notifier of a device without hardware.",
            "Do not offer HOST_NOTIFIER without hardware.",
        ),
        Rule::R1 => (
            Refused,
            "Features that were not offered are accepted, or a front-end without protocol features is not served.",
            "Refuse SET_FEATURES with bits that were not offered. Without bit 30 enable all rings at once.",
        ),
        Rule::R2 => (
            LosesPages,
            "A ring that runs before it is enabled writes guest memory while the front-end has not installed the log, or after it has taken its last look.",
            "Keep started and enabled apart. Serve a ring when it is both, and then read its avail ring without another kick.",
        ),
        Rule::R3 => (
            LosesPages,
            "The front-end takes the reply to GET_VRING_BASE as the end of all writes, and sends the remaining memory. Later writes are missing at the destination, and unpublished requests are lost.",
            "Before the reply, stop accepting requests, wait for those in flight, mark and publish them. Do not give up after a timeout.",
        ),
        Rule::R4 => (
            LosesRequests,
            "A ring continues at another position than where it stopped: requests are skipped or executed twice, or the driver finds unexpected used entries.",
            "Take SET_VRING_BASE as the next avail index, and the used index from the ring's memory; packed rings have both in the base.",
        ),
        Rule::R5 => (
            LosesRequests,
            "Switching the log on or off moves a running ring: requests are served again or skipped.",
            "Take only F_LOG from a SET_VRING_ADDR on a running ring.",
        ),
        Rule::R6 => (
            Stalls,
            "A device does not start under QEMU, which sends the inflight region before memory and the log after the kick.",
            "Accept messages in any order; look at rings only when they are started and enabled.",
        ),
        Rule::R7 => (
            Stalls,
            "A device does not start under User-mode Linux, or continues after User-mode Linux has disabled it.",
            "Do not check log_guest_addr without F_LOG; stop serving at ENABLE 0.",
        ),
        Rule::R8 => (
            LosesPages,
            "After a reset the device still writes to memory that the guest has reused.",
            "StopToken and disable all rings at RESET_DEVICE and at SET_STATUS 0, and let them be started again.",
        ),
        Rule::R9 => (
            LosesRequests,
            "After a disconnection, or after the named check, no other front-end is served: a guest cannot reconnect.",
            "Listen again when a connection ends, with the device as it was. If the back-end ends by design, have a supervisor start it each time.",
        ),
        Rule::R10 => (
            Stalls,
            "A completion without a call fd is never notified: the driver waits forever. Seen at migration destinations of QEMU.",
            "Note that a notification is due, and signal every new call fd then.",
        ),
        Rule::R11 => (
            Stalls,
            "Frames are spread over queue pairs that the driver does not use yet, and get lost.",
            "If the back-end serves the control queue, use one pair until VQ_PAIRS_SET.",
        ),
        Rule::R12 => (
            Corrupts,
            "With a used length above the number of written bytes, the driver takes old bytes for a reply.",
            "CheckReport the bytes that were written from the first writable byte on.",
        ),
        Rule::T1 => (
            Corrupts,
            "An address of the guest's IOMMU is used as a guest-physical one, or a page that is not permitted is accessed.",
            "Translate every address. Request missing translations with a MISS, and do not block the connection meanwhile.",
        ),
        Rule::T2 => (
            Corrupts,
            "An invalid message changes translations in use, or ends the connection.",
            "Check kind and range of each IOTLB_MSG, and refuse it without an effect.",
        ),
        Rule::T3 => (
            Corrupts,
            "The device uses a translation after it has acknowledged the invalidation: it writes to memory with another use.",
            "Wait for the requests that use the range, then acknowledge INVALIDATE.",
        ),
        Rule::T4 => (
            Corrupts,
            "A ring or buffer that is contiguous for the driver is assumed to be contiguous in memory.",
            "Translate page by page.",
        ),
        Rule::T5 => (
            Refused,
            "The feature only states that an IOMMU is supported.",
            "Offer ACCESS_PLATFORM only behind an IOMMU.",
        ),
        Rule::L1 => (
            LosesPages,
            "A page that the device has written is not marked: it is not sent again, and the guest finds old data after the migration. Marks for nothing make the migration longer.",
            "Mark gpa >> 12 to (gpa + len - 1) >> 12 of every write, and no others.",
        ),
        Rule::L2 => (
            LosesPages,
            "Marks are set at another position than the front-end reads, or beyond the end of the log.",
            "Map the file from its beginning or at the offset, not both; use every byte of the size, and check the file's length.",
        ),
        Rule::L3 => (
            LosesPages,
            "The used ring at the destination is older than the driver's view: completions are missing. QEMU hides this, others do not.",
            "With F_LOG mark flags, idx, elements and avail_event at log_guest_addr.",
        ),
        Rule::L4 => (
            LosesPages,
            "Used descriptors of a packed ring are missing at the destination: the ring stops or continues at a wrong position.",
            "Mark each descriptor that is written where the ring lies, and the event area at log_guest_addr.",
        ),
        Rule::L5 => (
            LosesPages,
            "Behind an IOMMU the wrong pages are marked.",
            "Translate log_guest_addr, and mark data by guest-physical addresses.",
        ),
        Rule::L6 => (
            Killed,
            "A write to a page outside the log ends the process or corrupts memory after the log.",
            "Compare each page with the size of the log; count and report what is outside.",
        ),
        Rule::L7 => (
            LosesPages,
            "Writes after logging was switched on are not marked, or the log is written after it was taken away.",
            "Follow LOG_ALL for data and F_LOG for used rings, from the acknowledgement on.",
        ),
        Rule::L8 => (
            LosesPages,
            "A back-end that is restarted during a migration writes memory before the log is there: those pages are lost.",
            "Touch no guest memory before the ring is enabled; accept LOG_ALL before SET_LOG_BASE.",
        ),
        Rule::L9 => (
            LosesPages,
            "After memory was added or the log was replaced, writes are not marked, or are marked in the old log.",
            "Continue logging across changes of memory and log. Reply to SET_LOG_BASE when the old log is no longer in use.",
        ),
        Rule::L10 => (
            LosesPages,
            "The driver sees a completion whose page is not marked. A harvest before the mark misses the page.",
            "Write data, then the mark, then the used index; a fence before a mark is skipped.",
        ),
        Rule::L11 => (LosesPages, "Marks of other devices in the same log are lost.", "Set marks with an atomic OR."),
        Rule::L12 => (
            Refused,
            "A front-end that uses SET_LOG_FD loses the connection or is not signalled. QEMU does not use it.",
            "Accept SET_LOG_FD with and without an fd; signal at most once per batch.",
        ),
        Rule::L13 => (
            LosesPages,
            "Concerns front-ends: a page is read before its mark is cleared.",
            "Take the mark first, then read the page.",
        ),
        Rule::L14 => (
            LosesPages,
            "Concerns front-ends: a page that could not be sent is forgotten.",
            "Put its mark back into the log.",
        ),
        Rule::L15 => (
            LosesPages,
            "A back-end fails during a migration; its marks are lost with the old log, because QEMU creates a new one.",
            "When a used ring starts with an empty log, mark all guest memory.",
        ),
        Rule::I1 => (
            LosesRequests,
            "Without a valid region the requests in flight at a crash are not known.",
            "Answer GET_INFLIGHT_FD with size, queues and a memfd; check all of it in SET_INFLIGHT_FD.",
        ),
        Rule::I2 => (
            LosesRequests,
            "The region does not record the requests in flight: after a crash they are lost or executed twice.",
            "Mark a request before it is started; publish the batch; then clear its marks.",
        ),
        Rule::I3 => (
            LosesRequests,
            "Requests in flight at a crash never complete, complete twice, or have no data.",
            "At the start clear the marks of the published batch, and execute the marked requests in the order of their counters.",
        ),
        Rule::I4 => (
            LosesRequests,
            "The same for packed rings.",
            "Stage a batch, publish it, commit the old_* fields; at the start roll back or forward by comparing them with the ring.",
        ),
        Rule::I5 => (
            LosesRequests,
            "At the destination of a migration a crash loses the request in the first descriptor.",
            "Set used_idx of a fresh region from the ring.",
        ),
        Rule::I6 => (
            LosesRequests,
            "Requests are executed again in another order.",
            "Continue counting above the largest counter in the region.",
        ),
        Rule::I7 => (
            LosesRequests,
            "After a reset the requests of the previous driver are executed.",
            "Set version 0 at a reset.",
        ),
        Rule::I8 => (
            Refused,
            "The feature only states that requests in flight can migrate; its numbers may still change.",
            "Do not offer it unless asked for.",
        ),
        Rule::I9 => (
            LosesRequests,
            "I/O of a killed process lands after that of its successor and overwrites it.",
            "Lock the image as long as I/O may be under way, and have the successor wait for the lock.",
        ),
        Rule::I10 => (
            LosesRequests,
            "A process that still runs completes requests that its successor executes again.",
            "Lock the image before the first read of ring and inflight region.",
        ),
        Rule::I11 => (
            LosesRequests,
            "A host that fails after a migration has lost writes that the guest at its destination relies on.",
            "Sync the image before GET_VRING_BASE is answered for the last running ring.",
        ),
        Rule::I12 => (
            Stalls,
            "A packed ring that continues at an old position never finds another request.",
            "Compare the base with the descriptors. If they contradict it, report the ring as broken.",
        ),
        Rule::M1 => (
            LosesPages,
            "Memory that is plugged while the guest runs is not served or not logged, or a wrong table is taken.",
            "Implement ADD_MEM_REG and REM_MEM_REG for 509 slots with logging; check offset and size against the fd; do not offer PAGEFAULT with it.",
        ),
        Rule::C1 => (
            ArrivesChanged,
            "The driver reads wrong properties of the device.",
            "Return exactly the bytes at the offset that was asked for, and echo offset and size.",
        ),
        Rule::D1 => (
            ArrivesChanged,
            "The device state is lost or damaged by a migration.",
            "Save and load complete states. Refuse a truncated state without an effect.",
        ),
        Rule::D2 => (
            Stalls,
            "A refusal after the commit leaves the guest stopped.",
            "Refuse SET_VRING_ENABLE before the kick if the ring could not be served.",
        ),
        Rule::P1 => (
            Corrupts,
            "In postcopy the device reads empty pages, or waits for pages that cannot be placed.",
            "Register memory with the userfaultfd before rings run, reply with your own addresses, and release waiting threads when the front-end disconnects.",
        ),
    };
    Explanation { rule, consequence, meaning, remedy }
}

impl Explanation {
    /// Returns the obligations of the rule as in `docs/protocol.md`, one per line with its number.
    pub fn text(&self) -> String {
        let heading = format!("\n### {} ", self.rule);
        let section = PROTOCOL.split_once(&heading).map_or("", |(_, section)| section);
        let section = section.split("\n\nTests:").next().unwrap_or_default();
        let bullets = section.split("\n- **").skip(1);
        let obligations = bullets.map(|bullet| strip_markdown(bullet.split("\n\n").next().unwrap_or_default()));
        obligations.collect::<Vec<_>>().join("\n")
    }
}

/// Joins lines and removes Markdown emphasis.
fn strip_markdown(markdown: &str) -> String {
    let words: Vec<&str> = markdown.split_whitespace().collect();
    let line = words.join(" ").replace("**", "").replace("*(seen)*", "(seen)").replace(" *", " ");
    line.trim_end_matches('*').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_has_text_meaning_and_remedy() {
        for id in Rule::ALL {
            let explanation = explain(*id);
            for part in [&*explanation.text(), explanation.meaning, explanation.remedy] {
                assert!(part.len() > 20 && part.ends_with(['.', ')']), "{id}: {part}");
                assert!(!part.contains("**"), "{id}: {part}");
            }
        }
        let text = explain("r3".parse().unwrap()).text();
        assert!(text.starts_with("R3.1 GET_VRING_BASE stops the ring.\nR3.2 Before the reply"), "{text}");
        assert!("X1".parse::<Rule>().is_err());
    }
}
