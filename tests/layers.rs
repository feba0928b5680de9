//! The dependencies between modules are those that docs/architecture.md lists, and have no circle.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

type Modules = BTreeMap<String, BTreeSet<String>>;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Returns the modules of the crate that code uses by `crate::`, without comments and unit tests.
fn used_modules(code: &str) -> BTreeSet<String> {
    let code = code.split("\n#[cfg(test)]").next().unwrap();
    let lines = code.lines().map(|line| line.split("//").next().unwrap());
    lines.flat_map(|line| line.split("crate::").skip(1)).flat_map(names).collect()
}

/// The first names of a path such as `dirty::Log`, or of `{dirty, memory::Region}`.
fn names(path: &str) -> Vec<String> {
    let name = |text: &str| text.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    match path.strip_prefix('{') {
        Some(list) => list.split(',').map(name).collect(),
        None => vec![name(path)],
    }
}

/// Returns each module in src, and the other modules that it uses.
fn modules() -> Modules {
    let mut files = Vec::new();
    rust_files(&root().join("src"), &mut files);
    let mut modules = Modules::new();
    for file in files {
        let relative = file.strip_prefix(root().join("src")).unwrap();
        let module = relative.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
        modules.entry(module).or_default().extend(used_modules(&fs::read_to_string(&file).unwrap()));
    }
    modules.remove("lib").unwrap();
    let all: BTreeSet<String> = modules.keys().cloned().collect();
    for (module, used) in &mut modules {
        used.retain(|other| all.contains(other) && other != module);
    }
    modules
}

/// Returns the table of docs/architecture.md: each module, and the modules that it may use.
fn documented() -> Modules {
    let text = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let table = text.split("| module | may use |\n|---|---|\n").nth(1).expect("docs/architecture.md has the table");
    let rows = table.lines().take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let mut words = row.split('`').skip(1).step_by(2).map(str::to_owned);
        (words.next().unwrap(), words.collect())
    })
    .collect()
}

#[test]
fn modules_use_what_the_architecture_lists_and_nothing_else() {
    let (documented, modules) = (documented(), modules());
    assert!(documented.keys().eq(modules.keys()), "a row for each module");
    for (module, used) in &modules {
        assert_eq!(&documented[module], used, "{module}: docs/architecture.md (left) and its code (right)");
    }
}

#[test]
fn modules_do_not_use_each_other_in_circles() {
    let mut left = modules();
    while !left.is_empty() {
        let free: Vec<String> = left.iter().filter(|(_, used)| used.is_empty()).map(|(name, _)| name.clone()).collect();
        assert!(!free.is_empty(), "these use each other in a circle: {left:?}");
        for module in &free {
            left.remove(module);
        }
        for used in left.values_mut() {
            used.retain(|other| !free.contains(other));
        }
    }
}

#[test]
fn the_reader_of_imports_finds_them() {
    let code = "use crate::dirty::Log;\n// crate::backend\n/// [`crate::guest`]\nuse crate::{abi, memory::Region};\n\
                fn f() { crate::sys::f() }\n\n#[cfg(test)]\nmod tests { use crate::check::f; }\n";
    assert!(used_modules(code).iter().eq(["abi", "dirty", "memory", "sys"]));
}
