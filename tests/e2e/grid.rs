//! Tables of faults: each square is run with real processes, several at a time, and what came of it is written down.

use std::collections::VecDeque;
use std::fmt::{Debug, Write as _};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

/// Writes the tables of what is allowed.
const WRITE: &str = "VMFERRY_WRITE_FAULTS";

/// Runs only squares whose name, as a failure shows it, has this in it.
const ONLY: &str = "VMFERRY_FAULTS_ONLY";

/// Rows and columns of what can be done; a square may be none.
pub(crate) struct Grid<C> {
    head: String,
    columns: usize,
    rows: Vec<(&'static str, Vec<Option<C>>)>,
}

/// What came of a square: what was seen, or why the test failed.
pub(crate) type Result<S> = std::result::Result<S, String>;

/// What can become of a guest.
pub(crate) trait Fate: Copy + Debug + Send + 'static {
    /// Every one there is.
    const ALL: &'static [Self];
    /// In a word.
    fn name(self) -> &'static str;
    /// In a sentence.
    fn meaning(self) -> &'static str;
}

/// What a square has shown.
#[derive(Clone, Debug)]
pub(crate) struct Seen<F> {
    pub(crate) outcome: F,
    /// From the fault to the decision of the processes that lived on.
    pub(crate) took: Duration,
    /// What was said of it.
    pub(crate) error: String,
}

/// What each fate means.
pub(crate) fn legend<F: Fate>() -> String {
    let mut text = String::new();
    for fate in F::ALL {
        writeln!(text, "- **{}**: {}", fate.name(), fate.meaning()).unwrap();
    }
    text
}

impl<C: Copy + Debug + PartialEq + Send> Grid<C> {
    /// With a name for the first column, names for the others, and rows of squares with theirs.
    pub(crate) fn new(
        corner: &str,
        columns: &[String],
        rows: Vec<(&'static str, Vec<Option<C>>)>,
    ) -> Self {
        Self {
            head: format!("| {corner} | {} |", columns.join(" | ")),
            columns: columns.len(),
            rows,
        }
    }

    /// All squares that are something.
    pub(crate) fn squares(&self) -> Vec<C> {
        let rows = self.rows.iter().flat_map(|(_, squares)| squares);
        rows.copied().flatten().collect()
    }

    /// A table of what `of` says of each.
    pub(crate) fn table(&self, of: impl Fn(C) -> String) -> String {
        let rule = " --- |".repeat(self.columns);
        let mut text = format!("{}\n| --- |{rule}\n", self.head);
        for (name, squares) in &self.rows {
            write!(text, "| {name} |").unwrap();
            for square in squares {
                let words = square.map_or_else(|| "-".to_owned(), &of);
                write!(text, " {words} |").unwrap();
            }
            text.push('\n');
        }
        text
    }

    /// Runs `wanted`, `workers` at a time; each worker keeps something of its own from one to the next. What was seen is printed and
    /// written to `file` beside the other results of the build.
    ///
    /// # Panics
    /// If one of them went wrong.
    pub(crate) fn assert_all<F: Fate, W: Default>(
        &self,
        file: &str,
        workers: usize,
        mut wanted: Vec<C>,
        run: impl Fn(C, &mut W) -> Result<Seen<F>> + Sync,
    ) {
        if let Ok(only) = std::env::var(ONLY) {
            wanted.retain(|square| format!("{square:?}").contains(&only));
        }
        let began = Instant::now();
        let count = wanted.len();
        let queue = Mutex::new(VecDeque::from(wanted));
        let results = Mutex::new(Vec::new());
        let work = || {
            let mut own = W::default();
            loop {
                let Some(square) = queue.lock().unwrap().pop_front() else {
                    return;
                };
                let attempt = AssertUnwindSafe(|| run(square, &mut own));
                let result = catch_unwind(attempt).unwrap_or_else(|panic| {
                    let text = panic.downcast_ref::<String>().cloned();
                    Err(text.unwrap_or_else(|| "panicked".to_owned()))
                });
                results.lock().unwrap().push((square, result));
            }
        };
        thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(work);
            }
        });
        let results = results.into_inner().unwrap();
        let report = self.report(&results);
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(file);
        fs::write(&path, &report).unwrap();
        println!("{report}");
        println!(
            "{count} cells in {:.0} s, written to {}",
            began.elapsed().as_secs_f64(),
            path.display()
        );
        let wrong: Vec<_> = results
            .iter()
            .filter_map(|(square, result)| Some((square, result.as_ref().err()?)))
            .collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    fn report<F: Fate>(&self, results: &[(C, Result<Seen<F>>)]) -> String {
        let mut report = self.table(|square| {
            let found = results.iter().find(|(of, _)| *of == square);
            match found {
                None => "not run".to_owned(),
                Some((_, Ok(seen))) => {
                    format!("{} ({:.1} s)", seen.outcome.name(), seen.took.as_secs_f64())
                }
                Some((_, Err(_))) => "WRONG".to_owned(),
            }
        });
        report.push_str("\n## What the source said\n\n");
        for (square, result) in results {
            if let Ok(seen) = result
                && !seen.error.is_empty()
            {
                writeln!(
                    report,
                    "- {square:?}: {}",
                    seen.error.trim().replace('\n', " / ")
                )
                .unwrap();
            }
        }
        report
    }
}

/// A file of the tests says just `text`; on demand it is written again.
pub(crate) fn assert_written(file: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    if std::env::var_os(WRITE).is_some() {
        fs::write(&path, text).unwrap();
    }
    assert!(
        fs::read_to_string(&path).unwrap() == text,
        "tests/{file} is out of date: write it again with {WRITE}=1"
    );
}
