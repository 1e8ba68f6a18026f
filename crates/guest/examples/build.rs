//! Builds a guest and prints its files as JSON: `build minimal|redis|tools|bench|debian|services|etcd [CACHE_DIR]`.
#![expect(clippy::print_stdout, reason = "printing is what an example is for")]

use guest::{GuestBuilder, GuestKind, default_cache_dir};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let what = args.next().unwrap_or_default();
    let builder = GuestBuilder::new(args.next().map_or_else(default_cache_dir, Into::into));
    let kind = match what.as_str() {
        "minimal" => GuestKind::Minimal,
        "redis" => GuestKind::Redis,
        "tools" => GuestKind::Tools,
        "bench" => GuestKind::Bench,
        "debian" => GuestKind::Debian,
        "services" => GuestKind::Services,
        "etcd" => {
            println!("{}", builder.etcd()?.display());
            return Ok(());
        }
        _ => {
            return Err(
                "usage: build minimal|redis|tools|bench|debian|services|etcd [CACHE_DIR]".into()
            );
        }
    };
    println!("{}", serde_json::to_string_pretty(&builder.build(kind)?)?);
    Ok(())
}
