//! What a back-end counts, through the `metrics` facade: a few sums for each batch of requests, which go nowhere until
//! the process installs a recorder.

#![forbid(unsafe_code)]

use super::Request;
use crate::abi::vhost_user::Request as Code;
use crate::memory::LOG_PAGE;
use crate::sys::counters::{Counter, counter};

/// What one running ring counts.
pub(super) struct RingCounters {
    requests: Counter,
    read_bytes: Counter,
    written_bytes: Counter,
    marked_pages: Counter,
    unlogged_pages: Counter,
    resubmitted: Counter,
    notifications: Counter,
    broken: Counter,
}

impl RingCounters {
    /// The counters of ring `index`; they go on from one connection to the next.
    pub(super) fn new(index: u16) -> RingCounters {
        let of = |name: &'static str| counter!(name, "ring" => index.to_string());
        RingCounters {
            requests: of("vhost_requests_total"),
            read_bytes: of("vhost_read_bytes_total"),
            written_bytes: of("vhost_written_bytes_total"),
            marked_pages: of("vhost_marked_pages_total"),
            unlogged_pages: of("vhost_unlogged_pages_total"),
            resubmitted: of("vhost_resubmitted_total"),
            notifications: of("vhost_notifications_total"),
            broken: of("vhost_broken_rings_total"),
        }
    }

    /// A batch that is about to be published; `logged` says whether what it wrote was marked.
    pub(super) fn completed(&self, requests: &[Request], logged: bool) {
        let (mut read, mut written, mut pages) = (0, 0, 0);
        for request in requests {
            read += request.readable_len();
            request.for_each_written(|gpa, len| {
                written += len;
                pages += gpa.saturating_add(len - 1) / LOG_PAGE - gpa / LOG_PAGE + 1;
            });
        }
        self.requests.increment(requests.len() as u64);
        self.read_bytes.increment(read);
        self.written_bytes.increment(written);
        if logged {
            self.marked_pages.increment(pages);
        }
    }

    /// Pages that lie outside the log (rule L6.2).
    pub(super) fn unlogged(&self, pages: u64) {
        self.unlogged_pages.increment(pages);
    }

    /// Requests of a predecessor that are served again.
    pub(super) fn resubmitted(&self, requests: usize) {
        self.resubmitted.increment(requests as u64);
    }

    pub(super) fn notified(&self) {
        self.notifications.increment(1);
    }

    pub(super) fn ring_broken(&self) {
        self.broken.increment(1);
    }
}

/// A request was answered by an error.
pub(super) fn request_failed(ring: u16) {
    counter!("vhost_failed_requests_total", "ring" => ring.to_string()).increment(1);
}

/// Another front-end has connected.
pub(super) fn frontend_connected() {
    counter!("vhost_connections_total").increment(1);
}

/// A message was answered or refused.
pub(super) fn message_handled(code: Code, refused: bool) {
    // A name, so that nobody makes up new series by sending numbers.
    let (request, result) = (code.name().unwrap_or("unknown"), if refused { "refused" } else { "done" });
    counter!("vhost_messages_total", "request" => request, "result" => result).increment(1);
}

/// Tells the recorder, once it is installed, what the counters mean.
#[cfg(feature = "metrics")]
pub fn describe_counters() {
    use metrics::describe_counter;

    describe_counter!("vhost_requests_total", "Requests completed");
    describe_counter!("vhost_read_bytes_total", "Bytes of requests that the driver wrote for the device");
    describe_counter!("vhost_written_bytes_total", "Bytes of guest memory that the device wrote for requests");
    describe_counter!("vhost_marked_pages_total", "Pages marked in the dirty log for requests");
    describe_counter!("vhost_unlogged_pages_total", "Pages written outside the dirty log, which a migration loses");
    describe_counter!("vhost_resubmitted_total", "Requests of a back-end that died, served again");
    describe_counter!("vhost_notifications_total", "Notifications of the driver");
    describe_counter!(
        "vhost_failed_requests_total",
        "Requests of a disk answered by an error, the driver's or the disk's"
    );
    describe_counter!("vhost_log_lines_left_out_total", "Lines of the log left out because too many were alike");
    describe_counter!("vhost_broken_rings_total", "Rings that stopped because the driver or front-end broke them");
    describe_counter!("vhost_connections_total", "Connections of front-ends");
    describe_counter!("vhost_messages_total", "Messages of front-ends, by request and result");
}
