//! The examples: those in the documentation of modules, and the programs in `examples/`, which are run and must print
//! the output in their comments. `tests/guide.rs` has the tests of `file_disk`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "kit/wait.rs"]
mod wait;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use wait::wait_until;

/// A program of `examples/`, which `cargo test` builds beside the tests.
fn example(name: &str) -> Command {
    let here = std::env::current_exe().unwrap();
    let path = here.parent().unwrap().parent().unwrap().join("examples").join(name);
    assert!(path.exists(), "build it first: cargo build --example {name}");
    let mut command = Command::new(path);
    command.stdin(Stdio::null());
    command
}

/// Runs a program to its end. Returns its output.
fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait_for_socket(path: &Path) {
    wait_until(&format!("the socket {}", path.display()), || path.exists());
}

/// Lines of documentation between "```" and "```" in the file.
fn doc_examples(text: &str) -> Vec<String> {
    let lines = text.lines().map(str::trim_start);
    let docs = lines.filter_map(|line| line.strip_prefix("//!").or_else(|| line.strip_prefix("///")));
    let docs: Vec<&str> = docs.map(str::trim).collect();
    let blocks = docs.split(|line| line.starts_with("```")).skip(1).step_by(2);
    blocks.map(|block| block.join("\n")).collect()
}

#[test]
fn every_public_module_has_an_example_and_every_example_runs() {
    let source = |name: &str| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src").join(name);
    let crate_root = fs::read_to_string(source("lib.rs")).unwrap();
    let modules: Vec<&str> =
        crate_root.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    assert!(modules.len() >= 13, "{modules:?}");
    for module in modules {
        let file = [format!("{module}/mod.rs"), format!("{module}.rs")].map(|name| source(&name));
        let text = file.iter().find_map(|path| fs::read_to_string(path).ok()).unwrap();
        let own = doc_examples(&text).iter().filter(|block| block.contains("use vhost_migrate::")).count();
        assert!(own > 0, "{module} has no example");
    }
    let mut folders = vec![source("")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let idle = ["```ignore", "```no_run", "```rust,ignore", "```rust,no_run"];
            assert!(!idle.iter().any(|fence| text.contains(fence)), "{}: an example that does not run", path.display());
        }
    }
}

#[test]
fn a_toy_vm_moves_between_two_processes_and_loses_no_write() {
    assert!(include_str!("../examples/migrate_vm.rs").lines().count() < 150);
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("vm.sock");
    let uri = format!("unix:{}", socket.display());
    let start = |side: &str| {
        let mut command = example("migrate_vm");
        Running(command.args([side, &uri]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    };
    let mut destination = start("destination");
    wait_for_socket(&socket);
    let told = output(example("migrate_vm").args(["source", &uri]));
    let number = |text: &str, before: &str| -> u64 {
        let digits = text.split(before).nth(1).unwrap_or_else(|| panic!("no {before:?} in {text:?}"));
        digits.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
    };
    let left = number(&told, "source: moved at step ");
    assert!(left > 1 && number(&told, " in ") >= 1, "{told}");

    assert!(destination.0.wait().unwrap().success());
    let mut told = String::new();
    std::io::Read::read_to_string(&mut destination.0.stdout.take().unwrap(), &mut told).unwrap();
    assert_eq!(number(&told, "destination: ran from step "), left, "{told}");
    assert!(number(&told, " to ") > left && told.contains("all 1024 pages verified"), "{told}");
}

#[test]
fn a_driven_disk_reads_its_sector_and_logs_the_pages_that_it_wrote() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, image) = (folder.path().join("socket"), folder.path().join("image"));
    let file = fs::File::create_new(&image).unwrap();
    file.set_len(1 << 20).unwrap();
    file.write_all_at(b"a sector's start", 7 * 512).unwrap();
    let _backend = Running(example("file_disk").args([&socket, &image]).spawn().unwrap());
    wait_for_socket(&socket);
    let told = output(example("drive_device").arg(&socket).arg("7"));
    let hex: String = b"a sector's start".iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(told.contains("disk: 2048 sectors") && told.contains(&format!("sector 7: {hex}")), "{told}");
    // The used ring, the data, the status.
    assert!(told.contains("513 bytes written, dirty pages: [3, 5, 6]"), "{told}");
    let end = example("drive_device").arg(&socket).arg("2048").output().unwrap();
    let why = String::from_utf8_lossy(&end.stderr).into_owned();
    assert!(!end.status.success() && why.contains("sector 2048 cannot be read: status 1"), "{why}");
}

#[test]
fn a_rust_vmm_device_logs_only_while_a_log_is_installed() {
    let told = output(&mut example("rust_vmm_device"));
    assert!(told.contains("written while logging: PageSet(3 of"), "{told}");
}
