//! The document that shows what `understudy bench engine` measured, written from the figures themselves.

use std::fs;
use std::path::Path;

use anyhow::Context;

use super::comparison::Comparison;
use super::figure::Report;
use super::plot;

/// What the picture shows.
const TITLE: &str = "Speed relative to QEMU TCG (more is faster)";
/// How it was measured, whatever was measured.
const HOW: &str = "\
Both machines run the same guests: Debian's kernel and programs for riscv64, from the same kernel image and initial RAM
disk, with one vCPU, 1 GiB of memory, a virtio disk and a virtio network device on a bridge. QEMU is
`qemu-system-riscv64 -M virt -accel tcg` as Debian ships it, with its default CPU.

- Times are taken outside, on the host's clock (or from the CPU time of the machine's process, where that is said below):
  from the line that a guest prints before a workload to the line after it, as they come out of
  the machine's process; for boots from the start of the process to the prompt.
- A workload runs on one machine and then, at once, on the next, while the others wait for a key; the order changes each
  turn. Each turn starts all machines anew, so translating the guest's code is part of every time. The table has the
  medians.
- What the workloads print is compared: a machine that computes something else fails.
- Understudy counts every instruction exactly in all columns. `recording` is the same machine writing its log to disk,
  `replay` the same log run again, with digests compared; QEMU's recording is `-icount shift=auto,rr=record`.
- The C programs are in `crates/understudy/bench`, compiled by Debian's gcc for riscv64 with `-O2 -march=rv64gc -static`;
  everything else is Debian's. The Debian that boots is its packages as unpacked, with users and a machine's identity:
  no script of a package has run.
";

/// Writes the document, its picture and the figures themselves below `dir`.
pub(crate) fn write(dir: &Path, report: &Report) -> anyhow::Result<()> {
    let comparison = report.sections.iter().find_map(|section| section.comparison.as_ref());
    let comparison = comparison.context("nothing was measured that could be written")?;
    fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    for (name, text) in [
        ("performance.md", document(report, comparison)),
        ("performance.svg", plot::svg(comparison, TITLE)),
        ("performance.json", serde_json::to_string_pretty(report)? + "\n"),
    ] {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

fn document(report: &Report, comparison: &Comparison) -> String {
    let mut text = format!(
        "# Performance\n\nWritten by `{}`; do not edit.\n\n{}\n\n\
         ![{TITLE}](performance.svg)\n\n{}\n## Against the aims\n\n{}\n## How it was measured\n\n{HOW}\n",
        report.machine.command,
        report.machine_line(),
        comparison.markdown(),
        report.markdown(),
    );
    for line in report.lines() {
        text.push_str(&format!("- {line}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::comparison::tests::sample;
    use super::super::figure::{Figure, Machine, Section, Target};
    use super::*;

    #[test]
    fn document_has_the_table_the_aims_and_the_notes() {
        let mut section = Section::new("engine");
        section.figures.push(Figure::new("mean", 1.5, "").aim(Target::AtLeast(2.0)));
        section.notes.push("two turns".into());
        section.comparison = Some(sample());
        let report = Report { machine: Machine::look(), sections: vec![section] };
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &report).unwrap();
        let text = fs::read_to_string(dir.path().join("performance.md")).unwrap();
        for part in
            ["| add | does add |", "| mean | 1.5 | >= 2 | missed |", "\n- engine: two turns\n"]
        {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        assert!(dir.path().join("performance.svg").exists());
        let json = fs::read_to_string(dir.path().join("performance.json")).unwrap();
        assert!(json.contains("\"comparison\""));
    }

    #[test]
    fn nothing_measured_is_said() {
        let report = Report { machine: Machine::look(), sections: vec![] };
        assert!(write(Path::new("/nonexistent"), &report).is_err());
    }
}
