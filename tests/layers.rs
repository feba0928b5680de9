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

/// Returns the modules that code uses by paths that begin with `prefix`, without comments and unit tests.
fn used_modules(code: &str, prefix: &str) -> BTreeSet<String> {
    let code = code.split("\n#[cfg(test)]").next().unwrap();
    let lines = code.lines().map(|line| line.split("//").next().unwrap());
    lines.collect::<Vec<_>>().join(" ").split(prefix).skip(1).flat_map(names).collect()
}

/// The first names of a path such as `dirty::Log`, or of `{dirty, memory::Region}`.
fn names(path: &str) -> Vec<String> {
    let name = |text: &str| text.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    match path.strip_prefix('{') {
        Some(list) => list.split('}').next().unwrap().split(',').map(name).collect(),
        None => vec![name(path)],
    }
}

/// Returns each module in a folder, and its other modules that it uses by paths with one of the prefixes. A folder in the
/// folder is one module.
fn modules_of(folder: &str, prefixes: impl Fn(&Path) -> Vec<&'static str>) -> Modules {
    let (mut files, mut modules) = (Vec::new(), Modules::new());
    let folder = root().join(folder);
    rust_files(&folder, &mut files);
    for file in files {
        let relative = file.strip_prefix(&folder).unwrap();
        let module = relative.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
        let code = fs::read_to_string(&file).unwrap();
        let used = prefixes(relative).into_iter().flat_map(|prefix| used_modules(&code, prefix));
        modules.entry(module).or_default().extend(used);
    }
    let all: BTreeSet<String> = modules.keys().cloned().collect();
    for (module, used) in &mut modules {
        used.retain(|other| all.contains(other) && other != module);
    }
    modules
}

/// Returns each module of the crate, and the other modules that it uses.
fn modules() -> Modules {
    let mut modules = modules_of("src", |_| vec!["crate::"]);
    modules.remove("lib").unwrap();
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

/// Fails if modules use each other in a circle.
fn assert_no_circle(mut left: Modules) {
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
fn modules_do_not_use_each_other_in_circles() {
    assert_no_circle(modules());
}

#[test]
fn files_of_check_do_not_use_each_other_in_circles() {
    let modules = modules_of("src/check", |file| match file.components().count() == 1 || file.ends_with("mod.rs") {
        true => vec!["super::", "crate::check::"],
        false => vec!["crate::check::"],
    });
    assert!(modules["table"].contains("log") && modules["log"].contains("harness"), "{modules:?}");
    assert!(modules.values().all(|used| !used.contains("table")), "only mod.rs uses the table: {modules:?}");
    assert_no_circle(modules);
}

/// An item that `mod.rs` exports is named after its own file, so that its use is seen.
#[test]
fn files_of_check_use_items_where_they_are_defined() {
    let mut files = Vec::new();
    rust_files(&root().join("src/check"), &mut files);
    for file in files {
        let code = fs::read_to_string(&file).unwrap();
        let is_flat = file.parent().is_some_and(|folder| folder.ends_with("check"));
        let prefixes = if is_flat { &["super::", "crate::check::"][..] } else { &["crate::check::"] };
        let used = prefixes.iter().flat_map(|prefix| used_modules(&code, prefix));
        let items: Vec<String> = used.filter(|name| name.starts_with(char::is_uppercase)).collect();
        assert!(items.is_empty(), "{}: {items:?}", file.display());
    }
}

#[test]
fn the_reader_of_imports_finds_them() {
    let code = "use crate::dirty::Log;\n// crate::backend\n/// [`crate::guest`]\nuse crate::{abi, memory::Region};\n\
                fn f() { crate::sys::f() }\n\n#[cfg(test)]\nmod tests { use crate::check::f; }\n";
    assert!(used_modules(code, "crate::").iter().eq(["abi", "dirty", "memory", "sys"]));
}
