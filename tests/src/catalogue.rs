//! Tables that say which test shows what: of the seed's cases, and of the defects of peers. A table can't go stale, because the
//! tests that it names must be there.

use std::{collections::BTreeSet, fs, path::Path};

/// What we have of something that others have, or got wrong.
#[derive(Clone, Copy, Debug)]
pub enum Ours {
    /// These tests show it, each written as `file::test` with the file's path in this repository; without a path it is in
    /// `tests/tests`.
    Tests(&'static [&'static str]),
    /// It means nothing here, for this reason.
    NoMeaning(&'static str),
    /// This has to come first.
    NotYet(&'static str),
}

impl Ours {
    /// That every test it names is there, or that it gives a reason.
    ///
    /// # Panics
    ///
    /// Panics if not.
    pub fn check(&self) {
        match self {
            Self::Tests(tests) => {
                assert!(!tests.is_empty(), "no test is named");
                for test in *tests {
                    assert!(is_there(test), "there is no test {test:?}");
                }
            }
            Self::NoMeaning(reason) | Self::NotYet(reason) => {
                assert!(reason.len() > 20, "{reason:?} is no reason");
            }
        }
    }

    /// The tests that it names.
    #[must_use]
    pub fn tests(&self) -> &'static [&'static str] {
        match self {
            Self::Tests(tests) => tests,
            Self::NoMeaning(_) | Self::NotYet(_) => &[],
        }
    }
}

/// That all tests of `file` (in `tests/tests`) are named by `rows`, but for those that look after the table itself.
///
/// # Panics
///
/// Panics if one is missing.
pub fn assert_all_named(file: &str, rows: impl Iterator<Item = Ours>, but: &[&str]) {
    let source = read(&format!("tests/tests/{file}.rs")).expect("the file of the table");
    let named: BTreeSet<_> = rows
        .flat_map(|row| row.tests())
        .filter_map(|test| test.strip_prefix(file)?.strip_prefix("::"))
        .chain(but.iter().copied())
        .collect();
    let there: BTreeSet<_> = tests_of(&source).into_iter().collect();
    assert_eq!(named, there);
}

fn is_there(test: &str) -> bool {
    let Some((file, name)) = test.rsplit_once("::") else {
        return false;
    };
    let path = match file.ends_with(".rs") {
        true => file.to_owned(),
        false => format!("tests/tests/{file}.rs"),
    };
    read(&path).is_some_and(|source| {
        tests_of(&source).contains(&name) || columns_of(&source).contains(&name)
    })
}

fn read(path: &str) -> Option<String> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
    fs::read_to_string(workspace.join(path)).ok()
}

/// The functions with an attribute `test`.
fn tests_of(source: &str) -> Vec<&str> {
    let mut tests = Vec::new();
    let mut is_test = false;
    for line in source.lines().map(str::trim) {
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            is_test = true;
        } else if let Some(function) = function(line).filter(|_| is_test) {
            tests.push(function);
            is_test = false;
        }
    }
    tests
}

/// The functions that `columns!` and `over_both!` make tests of.
fn columns_of(source: &str) -> Vec<&str> {
    let mut columns = Vec::new();
    for makes_tests in ["columns!(", "over_both!("] {
        for block in source.split(makes_tests).skip(1) {
            let list = block.split_once(");").map_or("", |(list, _)| list);
            columns.extend(list.split(',').map(str::trim));
        }
    }
    let functions: BTreeSet<_> = source.lines().filter_map(function).collect();
    columns.retain(|column| functions.contains(column));
    columns
}

/// The name of the function that a line begins.
fn function(line: &str) -> Option<&str> {
    let line = line.strip_prefix("async ").unwrap_or(line);
    Some(line.strip_prefix("fn ")?.split_once('(')?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_is_found_by_its_name_and_nothing_else_is() {
        let here = "tests/src/catalogue.rs";
        let found = |name: &str| is_there(&format!("{here}::{name}"));
        assert!(found("a_test_is_found_by_its_name_and_nothing_else_is"));
        assert!(!found("tests_of"), "it is no test");
        assert!(!found("a_test_is_found_by_its_name"), "only a part of one");
        assert!(!is_there("nowhere::a_test"));
        assert!(!is_there("without_a_file"));
    }

    #[test]
    fn tests_and_columns_of_a_source() {
        let source = "columns!(\n    one,\n    two\n);\nasync fn one(column: Column) {}\nfn helper() {}\n\
                      #[tokio::test(start_paused = true)]\n/// Why.\nasync fn three() {}\n#[test]\nfn four() {}\nfn five() {}\nover_both!(five);";
        assert_eq!(tests_of(source), ["three", "four"]);
        assert_eq!(columns_of(source), ["one", "five"]);
    }
}
