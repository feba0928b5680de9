//! Counters of the front-end, through the `metrics` facade. They are dropped until the process installs a recorder.

#![forbid(unsafe_code)]

use crate::abi::vhost_user::FrontendRequest;
use crate::sys::counters::counter;

/// Counts a message that was sent.
pub(super) fn message_sent(request: FrontendRequest) {
    counter!("vhost_frontend_messages_total", "request" => request.name().unwrap_or("unknown")).increment(1);
}

/// Counts a message that the back-end refused.
pub(super) fn message_refused(request: FrontendRequest) {
    counter!("vhost_frontend_refused_total", "request" => request.name().unwrap_or("unknown")).increment(1);
}

/// Counts a back-end request that was refused.
pub(super) fn backend_request_refused() {
    counter!("vhost_frontend_backend_requests_refused_total").increment(1);
}

/// Counts a reconnection and the requests that the inflight region had marked.
pub(super) fn reconnected(device: &str, resubmitted: u64) {
    let device = device.to_owned();
    counter!("vhost_frontend_reconnects_total", "device" => device.clone()).increment(1);
    counter!("vhost_frontend_resubmitted_total", "device" => device).increment(resubmitted);
}

/// Counts the dirty pages found in a device's log.
pub(super) fn harvested(device: &str, pages: u64) {
    counter!("vhost_frontend_harvested_pages_total", "device" => device.to_owned()).increment(pages);
}

/// Registers the descriptions of the counters. Call it after the recorder is installed.
#[cfg(feature = "metrics")]
pub fn describe_counters() {
    use metrics::describe_counter;

    describe_counter!("vhost_frontend_messages_total", "Messages to back-ends, by request");
    describe_counter!("vhost_frontend_refused_total", "Messages that back-ends refused, by request");
    describe_counter!(
        "vhost_frontend_backend_requests_refused_total",
        "Requests on the back-end channel that were refused"
    );
    describe_counter!("vhost_frontend_reconnects_total", "Times a back-end that was away has come back");
    describe_counter!("vhost_frontend_resubmitted_total", "Requests that were marked when it came back");
    describe_counter!("vhost_frontend_harvested_pages_total", "Dirty pages found in the log of a device");
}
