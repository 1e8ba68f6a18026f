//! A comparison's first ratio as a picture: a bar for each workload, as SVG.

use super::comparison::{Comparison, geometric_mean};

const WIDTH: f64 = 820.0;
const ROW: f64 = 22.0;
const TOP: f64 = 56.0;
/// Where bars begin, and where the longest ends.
const LEFT: f64 = 130.0;
const RIGHT: f64 = 760.0;

/// The picture; `title` says what the bars are. Without any ratio there are no bars.
pub(crate) fn svg(comparison: &Comparison, title: &str) -> String {
    let mut values: Vec<(&str, f64)> =
        comparison.ratios.first().map(|ratio| comparison.values(ratio)).unwrap_or_default();
    values.sort_by(|a, b| b.1.total_cmp(&a.1));
    let mean = geometric_mean(values.iter().map(|(_, value)| *value));
    let most = values.iter().map(|(_, value)| *value).fold(2.0, f64::max);
    let scale = (RIGHT - LEFT) / most;
    let height = TOP + ROW * values.len() as f64 + 34.0;
    let bottom = height - 30.0;
    let mut out = String::new();
    let mut add = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    add(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"13\">"
    ));
    add("<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>".to_owned());
    add(format!("<text x=\"{LEFT}\" y=\"22\" font-size=\"15\">{}</text>", escaped(title)));
    let mut mark = |value: f64, text: &str, color: &str, y: f64| {
        let x = LEFT + value * scale;
        add(format!(
            "<line x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{bottom}\" stroke=\"{color}\"/>\
             <text x=\"{x:.1}\" y=\"{y}\" fill=\"{color}\" text-anchor=\"middle\">{text}</text>"
        ));
    };
    let step = [0.5, 1.0, 2.0, 5.0].into_iter().find(|step| most / step <= 12.0).unwrap_or(10.0);
    let mut tick = 0.0;
    while tick <= most {
        mark(tick, &format!("{tick}"), if tick == 1.0 { "#333" } else { "#bbb" }, bottom + 18.0);
        tick += step;
    }
    if let Some(mean) = mean {
        mark(mean, &format!("mean {mean:.2}"), "#07c", TOP - 6.0);
    }
    for (index, (name, value)) in values.iter().enumerate() {
        let y = TOP + ROW * index as f64;
        let color = if *value < 1.0 { "#c55" } else { "#5a8" };
        add(format!(
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{LEFT}\" y=\"{}\" width=\"{:.1}\" height=\"{}\" fill=\"{color}\"/>\
             <text x=\"{:.1}\" y=\"{}\">{value:.2}</text>",
            LEFT - 8.0,
            y + 15.0,
            escaped(name),
            y + 3.0,
            value * scale,
            ROW - 6.0,
            LEFT + value * scale + 5.0,
            y + 15.0,
        ));
    }
    add("</svg>".to_owned());
    out
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::comparison::tests::sample;
    use super::*;

    #[test]
    fn there_is_a_bar_for_each_measured_workload() {
        let text = svg(&sample(), "a < b");
        assert_eq!(text.matches("fill=\"#5a8\"").count(), 1);
        assert!(text.contains(">add</text>") && !text.contains(">net</text>"), "{text}");
        assert!(text.contains("a &lt; b") && text.contains("mean 2.00"));
        assert_eq!(text.matches("<svg").count(), text.matches("</svg>").count());
    }

    #[test]
    fn nothing_measured_is_still_a_picture() {
        let mut none = sample();
        none.rows.clear();
        assert!(svg(&none, "none").ends_with("</svg>\n"));
    }
}
