//! Several processes mark in one log while another one harvests it: each mark is harvested exactly once (rule L11.1).
#![allow(clippy::unwrap_used)]

use std::os::fd::{AsFd, AsRawFd};
use std::process::{Child, Command};

use vhost_migrate::dirty::{Log, PageSet};
use vhost_migrate::memory::{GuestAddress, LOG_PAGE};

const PAGES: u64 = 1 << 16;
const PROCESSES: u64 = 3;
/// Environment variable of the processes that the test starts: path of the log, number of the process.
const PROCESS: &str = "VHOST_MIGRATE_TEST_MARKS";

/// The pages of one process. They never fill a word, so that all processes change the same words.
fn pages_of(process: u64) -> impl Iterator<Item = u64> {
    (0..PAGES).filter(move |page| page % 7 % PROCESSES == process)
}

/// Not a test by itself, but the code of the processes that the test below starts.
#[test]
fn a_process_marks_its_pages() {
    let Ok(process) = std::env::var(PROCESS) else { return };
    let (path, process) = process.rsplit_once(' ').unwrap();
    let process = process.parse().unwrap();
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let log = Log::map(file.as_fd(), file.metadata().unwrap().len(), 0).unwrap();
    for page in pages_of(process) {
        if page % 2 == 0 {
            log.mark(GuestAddress(page * LOG_PAGE), LOG_PAGE);
        } else {
            log.burst().mark(GuestAddress(page * LOG_PAGE + 7), 1);
        }
    }
}

#[test]
fn marks_of_several_processes_are_all_harvested() {
    let (log, fd) = Log::create(GuestAddress(PAGES * LOG_PAGE)).unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
    let start = |process| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_process_marks_its_pages"])
            .env(PROCESS, format!("{path} {process}"))
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut children: Vec<Child> = (0..PROCESSES).map(start).collect();
    let (mut set, mut reported) = (PageSet::new(PAGES), 0);
    while !children.is_empty() {
        reported += log.harvest(&mut set).pages;
        children.retain_mut(|child| match child.try_wait().unwrap() {
            Some(status) => {
                assert!(status.success());
                false
            }
            None => true,
        });
    }
    reported += log.harvest_stopped(&mut set).pages;
    assert_eq!(set.len(), PAGES);
    assert_eq!(reported, PAGES, "each page is marked once and reported once");
}
