//! First commands of a new user: the demo and its end, the commands of README and help, and mistyped values.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // also in the helpers of these tests

#[path = "kit/process.rs"]
mod process;
#[path = "kit/wait.rs"]
mod wait;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use serde_json::{Value, json};

use process::{ChildProcess, program, run, text, wait_for};

/// Starts a demo that runs for minutes. Its temporary folder is in `folder`.
fn long_demo(folder: &Path) -> ChildProcess {
    let mut demo = program();
    demo.args(["demo", "--memory", "64M", "--disk", "16M", "--seconds", "600", "--dirty-rate", "1M/s", "--json"]);
    demo.env("TMPDIR", folder).stdout(Stdio::piped()).stderr(Stdio::piped());
    ChildProcess(demo.spawn().unwrap())
}

/// Returns the child of `parent` whose command line contains all of `words`.
fn child(parent: u32, words: &[&str]) -> Option<Pid> {
    let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
    let mut children = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    children.find_map(|pid: i32| {
        let line = text(&std::fs::read(format!("/proc/{pid}/cmdline")).ok()?).replace('\0', " ");
        words.iter().all(|word| line.contains(word)).then_some(Pid::from_raw(pid))
    })
}

fn status(control: &Path) -> Option<Value> {
    serde_json::to_value(vhost_migrate::control::status(control).ok()?).ok()
}

fn is_in_state(control: &Path, state: &str) -> Option<()> {
    (status(control)?["state"] == state).then_some(())
}

/// Waits until the demo has failed. Returns its message.
fn failure(demo: &mut ChildProcess) -> String {
    assert_eq!(demo.0.wait().unwrap().code(), Some(1));
    let (mut output, mut errors) = (String::new(), String::new());
    demo.0.stdout.take().unwrap().read_to_string(&mut output).unwrap();
    demo.0.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
    let done: Value = serde_json::from_str(output.lines().last().unwrap()).unwrap();
    assert_eq!((&done["event"], &done["verified"]), (&json!("done"), &json!(false)), "{output}");
    assert!(errors.contains(done["message"].as_str().unwrap()), "{errors}");
    errors
}

#[test]
fn a_successful_demo_prints_no_error() {
    for kill in [&[][..], &["--kill"]] {
        let mut demo = program();
        demo.args(["demo", "--memory", "64M", "--disk", "16M", "--seconds", "1", "--dirty-rate", "1M/s"]).args(kill);
        let output = demo.output().unwrap();
        assert!(output.status.success() && text(&output.stdout).contains("verified"), "{}", text(&output.stderr));
        assert!(kill.len() == 1 || output.stderr.is_empty(), "{}", text(&output.stderr));
    }
}

#[rstest]
#[case::source_back_end(&["backend", "source.vhost"], "the source's back-end has ended")]
#[case::destination_back_end(&["backend", "destination.vhost"], "the destination's back-end has ended")]
#[case::source_guest(&["guest", "source.control"], "the guest's process at the source has ended")]
#[case::destination_guest(&["guest", "destination.control"], "the guest's process at the destination has ended")]
fn the_demo_fails_as_soon_as_one_of_its_processes_ends(#[case] words: &[&str], #[case] message: &str) {
    let folder = tempfile::tempdir().unwrap();
    let mut demo = long_demo(folder.path());
    let pid = demo.0.id();
    let killed = wait_for("the process", || child(pid, words));
    wait_for("all processes", || child(pid, &["guest", "source.control"]));
    kill(killed, Signal::SIGKILL).unwrap();
    let errors = failure(&mut demo);
    assert!(errors.contains(message), "{errors}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the folder is removed");
}

#[rstest]
fn an_interrupted_demo_ends_its_processes_and_removes_its_folder(
    #[values(Signal::SIGINT, Signal::SIGTERM)] signal: Signal,
) {
    let folder = tempfile::tempdir().unwrap();
    let mut demo = long_demo(folder.path());
    let pid = demo.0.id();
    let guest = wait_for("the guest's process", || child(pid, &["guest", "source.control"]));
    kill(Pid::from_raw(pid as i32), signal).unwrap();
    assert!(failure(&mut demo).contains("interrupted"));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the folder is removed");
    assert!(kill(guest, None).is_err(), "the guest's process has ended");
}

#[test]
fn mistyped_values_are_refused_with_an_example_of_a_right_one() {
    for (arguments, hint) in [
        (&["demo", "--memory", "1GB"][..], "1.5M or 1G"),
        (&["demo", "--seconds", "nan"], "number of seconds"),
        (&["demo", "--downtime", "fast"], "50ms"),
        (&["migrate", "--control", "c", "unix:x", "--bandwidth", "500"], "'500' has no unit"),
        (&["migrate", "--control", "c", "unix:x", "--bandwidth", "0"], "leave the option out"),
        (&["migrate", "--control", "c", "unix:x", "--codec", "lz5"], "zstd"),
        (&["dirty-rate", "--control", "c", "--bandwidth", "1000"], "has no unit"),
        (&["guest", "--backend", "b", "--control", "c", "--dirty-rate", "100"], "has no unit"),
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(text(&output.stderr).contains(hint), "{arguments:?}: {}", text(&output.stderr));
    }
    // Valid values fail later, at missing files.
    for downtime in ["50", "50ms", "0.05s"] {
        let arguments =
            ["migrate", "--control", "/nonexistent/c", "unix:x", "--downtime", downtime, "--bandwidth", "1G/s"];
        assert!(text(&run(&arguments).stderr).contains("/nonexistent/c"));
    }
}

#[test]
fn a_guest_command_detects_a_vhost_user_socket() {
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("disk.img"), folder.path().join("disk.sock"));
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let mut backend = program();
    backend.args(["backend", "blk", "--image"]).arg(&image).arg("--socket").arg(&socket);
    let _backend = ChildProcess(backend.spawn().unwrap());
    wait_for("the back-end", || UnixStream::connect(&socket).ok());
    let output = run(&["dirty-rate", "--control", socket.to_str().unwrap()]);
    let errors = text(&output.stderr);
    assert!(!output.status.success() && errors.contains("vhost-user socket of a back-end"), "{errors}");
}

/// Returns the commands of the block of `document` that starts with `first`: indented or fenced lines up to an empty or
/// other line.
fn commands(document: &str, first: &str) -> Vec<String> {
    let block: Vec<&str> = document.lines().map(str::trim).skip_while(|line| !line.starts_with(first)).collect();
    let commands: Vec<_> = block.into_iter().take_while(|line| !line.is_empty() && *line != "```").collect();
    assert!(!commands.is_empty(), "no block begins with {first}");
    commands.join("\n").replace("\\\n", " ").lines().map(Into::into).collect()
}

/// Runs commands in `folder` like a shell; commands that end with `&` run in the background. Before a command for a
/// guest, the guest is waited for.
fn run_commands(commands: &[String], folder: &Path) -> Vec<ChildProcess> {
    let mut running = Vec::new();
    let path = Path::new(env!("CARGO_BIN_EXE_vhost-migrate")).parent().unwrap().display().to_string();
    for command in commands {
        let words: Vec<_> = command.split_whitespace().collect();
        if let ["vhost-migrate", "migrate" | "dirty-rate", "--control", control, ..] = words[..] {
            wait_for("the guest", || is_in_state(&folder.join(control), "running"));
        }
        let (line, goes_on) = command.strip_suffix('&').map_or((command.as_str(), false), |line| (line, true));
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("exec {line}")]).current_dir(folder).stdout(Stdio::null());
        shell.env("PATH", format!("{path}:{}", std::env::var("PATH").unwrap())).env("RUST_LOG", "warn");
        let mut child = ChildProcess(shell.spawn().unwrap());
        match goes_on {
            true => running.push(child),
            false => assert!(child.0.wait().unwrap().success(), "{command}"),
        }
    }
    running
}

#[test]
fn the_readme_commands_migrate_a_guest() {
    let folder = tempfile::tempdir().unwrap();
    let readme = include_str!("../README.md");
    let _running = run_commands(&commands(readme, "truncate -s 64M disk.img"), folder.path());
    wait_for("the guest at its destination", || is_in_state(&folder.path().join("destination.ctl"), "running"));
}

/// Like a block pasted into a shell. Each check is limited to few rules, to save time.
#[test]
fn the_readme_check_commands_run_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let readme = include_str!("../README.md");
    let blocks =
        ["truncate -s 64M check.img", "vhost-migrate check disk.sock --junit"].map(|first| commands(readme, first));
    let listens = "until grep -q '00010000 .* disk.sock$' /proc/net/unix; do sleep 0.01; done";
    let script = blocks.concat().join("\n").replace("sleep 1", listens);
    let script =
        script.replace("check disk.sock\n", "check disk.sock --only F1\n").replace("--junit", "--only F1,I3 --junit");
    let path = Path::new(env!("CARGO_BIN_EXE_vhost-migrate")).parent().unwrap().display().to_string();
    let mut shell = Command::new("sh");
    shell.args(["-ec", &script]).current_dir(folder.path()).env_remove("RUST_LOG");
    let output = shell.env("PATH", format!("{path}:{}", std::env::var("PATH").unwrap())).output().unwrap();
    let (told, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success() && errors.is_empty(), "{script}\n{told}\n{errors}");
    assert!(told.matches(" pass ").count() >= 4, "{told}");
    assert!(std::fs::read_to_string(folder.path().join("check.xml")).unwrap().contains("I3"));
}

#[test]
fn the_help_examples_work_together() {
    let folder = tempfile::tempdir().unwrap();
    let help = text(&run(&["guest", "--help"]).stdout);
    // The examples after these three wait for a guest to arrive.
    let start = commands(&help, "truncate -s 64M disk.img");
    let _running = run_commands(&start[..3], folder.path());
    wait_for("the guest", || is_in_state(&folder.path().join("source.ctl"), "running"));
}
