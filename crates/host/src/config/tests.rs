//! Each mistake in a configuration gives one line that names the file and the place.

use super::*;

const HOST: &str = r#"
name = "alpha"
listen = "10.0.0.1:7000"
secret_file = "/etc/understudy/secret"
arbiter = { dir = "/srv/arbiter" }

[peers]
beta = "10.0.0.2:7000"
"#;

const VM: &str = r#"
name = "web"
memory = "512M"
harts = 2
kernel = "Image"
append = "root=/dev/vda"

[[disk]]
path = "/srv/web.img"

[[disk]]
path = "tools.img"
mode = "shared"
readonly = true

[[net]]
bridge = "br0"

[[net]]
tap = "tap7"
mac = "52:54:00:12:34:56"

[protection]
hosts = ["beta"]
"#;

fn vm(text: &str) -> Result<VmConfig, String> {
    VmConfig::parse(text, "web.toml", Path::new("/vms")).map_err(|e| e.to_string())
}

fn host(text: &str) -> Result<HostConfig, String> {
    HostConfig::parse(text, "host.toml").map_err(|e| e.to_string())
}

#[test]
fn host_configuration_with_defaults() {
    let config = host(HOST).unwrap();
    assert_eq!(config.arbiter, ArbiterSection::Dir("/srv/arbiter".into()));
    assert_eq!(config.peers["beta"].address, "10.0.0.2:7000");
    assert_eq!((config.detection_ms, config.engine), (100, None));
    let engine = host(&format!("engine = \"interpreter\"\n{HOST}")).unwrap().engine;
    assert_eq!(engine, Some(EngineKind::Interpreter));
    let etcd = HOST.replace(r#"dir = "/srv/arbiter""#, r#"etcd = ["http://a:1", "http://b:2"]"#);
    assert!(matches!(host(&etcd).unwrap().arbiter, ArbiterSection::Etcd(e) if e.len() == 2));
}

#[test]
fn fencing_by_host_before_the_one_for_all() {
    let text = format!(
        "{HOST}\n[fence]\ncommand = \"cut $UNDERSTUDY_HOST\"\ntimeout_s = 20\n[fence.host.beta]\nagent = \"fence_ipmilan\"\n\
         action = \"off\"\noptions = {{ ip = \"10.0.9.2\", lanplus = true, ipport = 623 }}\n"
    );
    let fence = host(&text).unwrap().fence;
    assert_eq!(fence.timeout().as_secs(), 20);
    assert_eq!((fence.attempts, fence.grace().as_millis()), (3, 300));
    let command = FenceMethod::Command("cut $UNDERSTUDY_HOST".to_owned());
    assert_eq!(fence.method("gamma"), Some(command));
    let Some(FenceMethod::Agent { agent, options, action }) = fence.method("beta") else {
        panic!("{fence:?}");
    };
    assert_eq!((agent.as_str(), action), ("fence_ipmilan", FenceAction::Off));
    let lines: Vec<String> = options.iter().map(|(key, value)| format!("{key}={value}")).collect();
    assert_eq!(lines, ["ip=10.0.9.2", "ipport=623", "lanplus=1"]);
    assert!(host(HOST).unwrap().fence.is_empty());
    for (wrong, what) in [
        ("timeout_s = 0", "timeout_s is 0"),
        ("host = { gamma = { command = \"x\" } }", "no such peer"),
        ("host = { beta = { } }", "either a command or an agent"),
        ("host = { beta = { command = \"x\", agent = \"y\" } }", "either a command or an agent"),
        ("host = { beta = { agent = \"y\", options = { action = \"on\" } } }", "a key of its own"),
        ("host = { beta = { agent = \"y\", options = { \"a=b\" = \"on\" } } }", "not of one line"),
        ("host = { beta = { command = \"y\", options = { a = 1 } } }", "options are for an agent"),
    ] {
        let error = host(&format!("{HOST}\n[fence]\n{wrong}\n")).unwrap_err();
        assert!(error.contains(what) && !error.contains('\n'), "{error}");
    }
}

#[test]
fn shared_images_have_lock_files() {
    let shared = "[[disk]]\npath = \"data.img\"\nmode = \"shared\"\n";
    let config = vm(&format!("{VM}\n{shared}")).unwrap();
    let locks: Vec<bool> = config.disks.iter().map(DiskSection::is_locked).collect();
    assert_eq!(locks, [false, false, true]);
    assert_eq!(config.disks[2].lock_path(), Path::new("/vms/data.img.lock"));
    let given = vm(&format!("{VM}\n{shared}lock = \"locks/data\"\n")).unwrap();
    assert_eq!(given.disks[2].lock_path(), Path::new("/vms/locks/data"));
    let device = format!("{VM}\n[[disk]]\npath = \"/dev/san\"\nmode = \"shared\"\n");
    let refused = vm(&device).unwrap_err();
    assert!(refused.contains("give the disk lock = \"PATH\""), "{refused}");
    vm(&format!("{device}lock = \"/mnt/locks/san\"\n")).unwrap();
    let mirrored = format!("{VM}\n[[disk]]\npath = \"x\"\nlock = \"y\"\n");
    assert!(vm(&mirrored).unwrap_err().contains("lock is for disks with mode"));
}

#[test]
fn mistakes_are_one_line_with_file_and_line() {
    let cases = [
        (HOST.replace("listen", "listne"), "host.toml:3: unknown field `listne`"),
        (HOST.replace("10.0.0.1:7000", "10.0.0.1"), "host.toml:3: address \"10.0.0.1\" is not"),
        (HOST.replace("alpha", "al/pha"), "host.toml:2: name \"al/pha\" is not usable"),
        (HOST.replace("beta =", "alpha ="), "host.toml:8: peer \"alpha\" is this host itself"),
        (HOST.replace("dir =", "dri ="), "host.toml:5: unknown variant `dri`"),
        (format!("detection_ms = 5\n{HOST}"), "host.toml:1: detection_ms is 5"),
        (format!("engine = \"tcg\"\n{HOST}"), "host.toml:1: there is no engine 'tcg'"),
        (HOST.replace("name =", "name"), "host.toml:2: "),
        (HOST.replace("secret_file", "# x"), "host.toml:1: missing field `secret_file`"),
    ];
    for (text, expected) in cases {
        let error = host(&text).unwrap_err();
        assert!(error.starts_with(expected) && !error.contains('\n'), "{error}");
    }
    let missing = HostConfig::load(Path::new("/nowhere/host.toml")).unwrap_err().to_string();
    assert!(missing.starts_with("/nowhere/host.toml: cannot be read: No such file"), "{missing}");
}

#[test]
fn vm_configuration_becomes_a_machine() {
    let config = vm(VM).unwrap();
    assert_eq!(config.kernel.as_deref(), Some(Path::new("/vms/Image")));
    assert_eq!(config.disks[0].path, Path::new("/srv/web.img"));
    assert_eq!(config.disks[1].path, Path::new("/vms/tools.img"));
    assert_eq!(config.disks[1].mode, DiskMode::Shared);
    assert!(config.protection.enabled);
    assert_eq!(config.protection.lag_ms, 300);
    let drawn = Drawn { rtc_base_ns: 7, rng_seed: vec![1; 32] };
    assert!(config.machine_config(&[512], drawn.clone()).is_err());
    let machine = config.machine_config(&[512, 1024], drawn).unwrap();
    assert_eq!((machine.harts, machine.ram_size, machine.rngs), (2, 512 << 20, 1));
    assert_eq!(machine.disks[1].size, 1024);
    assert!(machine.disks[1].readonly && !machine.disks[0].readonly);
    assert_eq!(machine.disks[1].serial, "web-1");
    assert_eq!(machine.nets[0].mac, stable_mac("web", 0));
    assert_eq!(machine.nets[1].mac, [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    assert_eq!(machine.rtc_base_ns, 7);
}

#[test]
fn impossible_vms_are_refused() {
    let cases = [
        (VM.replace("512M", "5 12M"), "web.toml:3: size \"5 12M\" is not a number"),
        (VM.replace("512M", "33M"), "web.toml:3: memory has to be a multiple of 2M"),
        (VM.replace("harts = 2", "harts = 9"), "web.toml:4: harts is 9, it has to be from 1 to 8"),
        (VM.replace("52:54:00", "53:54:00"), "web.toml:21: MAC address"),
        (VM.replace("12:34:56", "+2:34:56"), "web.toml:21: MAC address"),
        (VM.replace("br0", "a/b"), "web.toml:17: interface name \"a/b\""),
        (
            "name = \"web\"\nmemory = \"32M\"".to_owned(),
            "web.toml:1: neither kernel nor bios is given",
        ),
        (format!("u_boot = \"u\"\n{VM}"), "web.toml:1: u_boot is given beside a kernel"),
        (VM.replace("br0\"", "br0\"\nmacvtap = \"eth0\""), "web.toml: a network device has one of"),
        (VM.replace("br0\"", "br0\"\nports = [\"80:80\"]"), "web.toml:18: ports are forwarded"),
        (
            VM.replace("bridge = \"br0\"", "passt = true\nports = [\"x\"]"),
            "web.toml:18: \"x\" is not",
        ),
        (VM.replace("bridge = \"br0\"", "passt = true"), "web.toml:17: a VM with passt cannot be"),
        (format!("consoles = 4\n{VM}"), "web.toml:3: 9 devices"),
        (VM.replace("readonly = true", "readonly = 1"), "web.toml:14: invalid type"),
        (
            VM.replace("hosts = [\"beta\"]", "lag_ms = 199"),
            "web.toml:24: lag_ms is 199, it has to be from 200 to 2000",
        ),
    ];
    for (text, expected) in cases {
        let error = vm(&text).unwrap_err();
        assert!(error.starts_with(expected) && !error.contains('\n'), "{error}");
    }
}

#[test]
fn log_has_a_network_of_its_own_where_one_is_given() {
    let text = HOST.replace(
        "beta = \"10.0.0.2:7000\"",
        "beta = { address = \"10.0.0.2:7000\", log_address = \"192.168.9.2:7701\" }",
    );
    let more = "log_address = \"192.168.9.1:7701\"\nlog_compression = \"lz4\"\n";
    let config = host(&format!("{more}{text}")).unwrap();
    let source = config.log_source();
    assert_eq!(source, Some([192, 168, 9, 1].into()));
    assert_eq!(config.log_compression, LogCompression::Lz4);
    let routes = config.peers["beta"].routes(source);
    let second = Route::to("10.0.0.2:7000");
    assert_eq!(routes, [Route { address: "192.168.9.2:7701".into(), source }, second.clone()]);
    let plain = host(HOST).unwrap();
    assert_eq!(plain.peers["beta"].routes(plain.log_source()), [second]);
    assert_eq!(plain.log_compression, LogCompression::None);
    let cases = [
        (
            format!("log_address = \"name:1\"\n{HOST}"),
            "host.toml:1: log_address \"name:1\" has no IP",
        ),
        (
            text.replace("192.168.9.2:7701", "192.168.9.2"),
            "host.toml:8: address \"192.168.9.2\" is not",
        ),
        (format!("log_compression = \"zip\"\n{HOST}"), "host.toml:1: unknown variant `zip`"),
        (HOST.replace("\"10.0.0.2:7000\"", "7"), "host.toml:8: a peer is"),
    ];
    for (text, expected) in cases {
        let error = host(&text).unwrap_err();
        assert!(error.starts_with(expected) && !error.contains('\n'), "{error}");
    }
}

#[test]
fn vm_with_passt_is_taken_without_protection() {
    let text = "name = \"v\"\nmemory = \"32M\"\nkernel = \"k\"\n[[net]]\npasst = true\nports = [\"127.0.0.1:80:8080\"]\n\
                [[net]]\nmacvtap = \"eth0\"\n[protection]\nenabled = false\n";
    let config = vm(text).unwrap();
    assert_eq!(config.nets[0].ports[0].to_string(), "127.0.0.1/80:8080");
    assert_eq!(config.nets[1].macvtap.as_deref(), Some("eth0"));
    assert!(config.unprotectable().unwrap().contains("network device 0"));
}

#[test]
fn boot_files_are_read_or_named() {
    let tmp = tempfile::tempdir().unwrap();
    let file = tmp.path().join("vm.toml");
    std::fs::write(&file, "name = \"v\"\nmemory = \"32M\"\nkernel = \"k\"\nappend = \"x\"")
        .unwrap();
    let config = VmConfig::load(&file).unwrap();
    let error = config.boot_images().unwrap_err();
    assert!(error.starts_with("VM v: cannot read kernel /"), "{error}");
    assert!(error.ends_with("/k: No such file or directory (os error 2)"), "{error}");
    std::fs::write(tmp.path().join("k"), "").unwrap();
    assert!(config.boot_images().unwrap_err().ends_with("it is empty"));
    std::fs::write(tmp.path().join("k"), "abc").unwrap();
    let images = config.boot_images().unwrap();
    assert_eq!((images.kernel.as_deref(), images.append.as_str()), (Some(&b"abc"[..]), "x"));
    assert_eq!(images.bios, None);
}

#[test]
fn what_cloud_init_is_told_is_one_more_disk_that_is_only_read() {
    let config = vm(&format!("{VM}[cloud_init]\nuser_data = \"u\"\n")).unwrap();
    let seed = config.disks.last().unwrap();
    assert_eq!((config.disks.len(), seed.path.as_path()), (3, Path::new("/srv/web.seed")));
    assert!(seed.readonly && seed.mode == DiskMode::Mirrored);
    assert!(config.write_seed(true).unwrap_err().contains("cannot read /vms/u"));
    let named = vm(&format!("{VM}[cloud_init]\nseed = \"s\"\n")).unwrap();
    assert_eq!(named.disks[2].path, Path::new("/vms/s"));
}

#[test]
fn a_disk_alone_boots_by_firmware_whose_parts_can_be_named() {
    let config =
        vm(&VM.replace("kernel", "u_boot").replace("harts", "bios = \"b\"\nharts")).unwrap();
    assert_eq!(config.u_boot.as_deref(), Some(Path::new("/vms/Image")));
    assert!(config.boot_images().unwrap_err().starts_with("VM web: cannot read bios /vms/b: "));
    let bios_alone = vm(&VM.replace("kernel", "bios")).unwrap();
    assert!(bios_alone.boot_images().unwrap_err().contains("cannot read bios /vms/Image"));
    match vm(&VM.replace("kernel = \"Image\"", "")).unwrap().boot_images() {
        Ok(images) => assert!(images.bios.is_some() && images.kernel.is_some()),
        Err(e) => assert!(e.contains("install Debian's package"), "{e}"),
    }
}

#[test]
fn made_mac_addresses_are_stable_and_differ() {
    assert_eq!(stable_mac("web", 0), stable_mac("web", 0));
    assert_ne!(stable_mac("web", 0), stable_mac("web", 1));
    assert_ne!(stable_mac("web", 0), stable_mac("web2", 0));
    assert_eq!(stable_mac("web", 0)[0] & 3, 2);
}

#[test]
fn limits_of_a_disk_are_read_and_none_is_zero() {
    let keys = "aio = \"threads\"\niops = 500\nbytes_per_second = \"50M\"\nbytes_burst = \"1G\"";
    let text = VM.replace("readonly = true", &format!("readonly = true\n{keys}"));
    let config = vm(&text).unwrap();
    let limits = crate::disk::Limits {
        iops: Some(500),
        bytes_per_second: Some(50 << 20),
        bytes_burst: Some(1 << 30),
        ..crate::disk::Limits::default()
    };
    assert_eq!(
        (config.disks[1].limits(), config.disks[1].aio),
        (limits, crate::disk::Aio::Threads)
    );
    assert!(!config.disks[0].limits().is_any());
    assert!(vm(&text.replace("iops = 500", "iops = 0")).unwrap_err().contains("without a limit"));
    assert!(vm(&text.replace("threads", "fibres")).unwrap_err().contains("fibres"));
}
