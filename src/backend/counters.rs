//! Metrics of a back-end, through the `metrics` facade: a few counter updates per batch of requests, which cost nothing
//! noticeable until the process installs a recorder.

#![forbid(unsafe_code)]

use crate::abi::vhost_user::FrontendRequest as Code;
use crate::backend::Request;
use crate::memory::LOG_PAGE;
use crate::sys::counters::{Counter, counter};

/// The counters of one running ring.
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
    /// Creates the counters of ring `index`. They continue across connections.
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

    /// Counts a batch that is about to be published. `logged` is true if its writes were marked in the log.
    pub(super) fn completed(&self, requests: &[Request], logged: bool) {
        let (mut read, mut written, mut pages) = (0, 0, 0);
        for request in requests {
            read += request.readable_len();
            request.for_each_written(|gpa, len| {
                written += len;
                pages += gpa.0.saturating_add(len - 1) / LOG_PAGE - gpa.0 / LOG_PAGE + 1;
            });
        }
        self.requests.increment(requests.len() as u64);
        self.read_bytes.increment(read);
        self.written_bytes.increment(written);
        if logged {
            self.marked_pages.increment(pages);
        }
    }

    /// Counts pages outside the log (rule L6.2).
    pub(super) fn unlogged(&self, pages: u64) {
        self.unlogged_pages.increment(pages);
    }

    /// Counts resubmitted requests of a previous back-end.
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

/// Counts a request that completed with an error status.
pub(super) fn request_failed(ring: u16) {
    counter!("vhost_failed_requests_total", "ring" => ring.to_string()).increment(1);
}

/// Counts a connection.
pub(super) fn frontend_connected() {
    counter!("vhost_connections_total").increment(1);
}

/// Counts a message, by request and result.
pub(super) fn message_handled(code: Code, refused: bool) {
    // Only known names: a peer must not be able to create new time series by sending numbers.
    let (request, result) = (code.name().unwrap_or("unknown"), if refused { "refused" } else { "done" });
    counter!("vhost_messages_total", "request" => request, "result" => result).increment(1);
}

/// Registers the descriptions of all counters with the installed recorder.
#[cfg(feature = "metrics")]
pub fn describe_counters() {
    use metrics::describe_counter;

    describe_counter!("vhost_requests_total", "Requests completed");
    describe_counter!("vhost_read_bytes_total", "Bytes of requests that the driver wrote for the device");
    describe_counter!("vhost_written_bytes_total", "Bytes of guest memory that the device wrote for requests");
    describe_counter!("vhost_marked_pages_total", "Pages marked in the dirty log for requests");
    describe_counter!("vhost_unlogged_pages_total", "Pages written outside the dirty log, which a migration loses");
    describe_counter!("vhost_resubmitted_total", "Requests of a previous back-end that were resubmitted");
    describe_counter!("vhost_notifications_total", "Notifications of the driver");
    describe_counter!(
        "vhost_failed_requests_total",
        "Disk requests that completed with an error, of the driver or of the disk"
    );
    describe_counter!("vhost_log_lines_left_out_total", "Log lines suppressed because of their rate");
    describe_counter!("vhost_broken_rings_total", "Rings that stopped because the driver or front-end broke them");
    describe_counter!("vhost_connections_total", "Connections of front-ends");
    describe_counter!("vhost_messages_total", "Messages of front-ends, by request and result");
}
