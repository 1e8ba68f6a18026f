//! Arbiter in etcd v3, over its JSON gateway: a transaction that compares the key's revision decides.
//!
//! # Place
//! See [`super`]. One call takes no longer than the configured time, shared by the endpoints, which are tried in turn.
//!
//! # Invariants
//! - Reads are linearizable (etcd's default), and a write happens only in a transaction that compares `mod_revision`
//!   with what was read in the same call (0: no key), so the generation checked is the one replaced.
//!
//! # Failure
//! When the answer to a transaction is lost, the next endpoint is asked with the same comparison; where that fails,
//! the record found tells whether the first one was stored. When no endpoint answers: [`ArbiterError::Ambiguous`].
//!
//! # References
//! etcd 3.4 API reference: `/v3/kv/range` and `/v3/kv/txn`. 64-bit numbers are strings, default values are left out.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Arbiter, ArbiterError, CasOutcome, Record, base64, check_claim, check_vm};
use crate::one_line::{flatten, one_line};

/// Time for one call when nothing else is configured.
pub const TIMEOUT_DEFAULT: Duration = Duration::from_secs(1);
/// Where the keys are.
const KEY_PREFIX: &str = "/understudy/vm/";
/// Most bytes of an answer that are read.
const ANSWER_BYTES_MAX: u64 = 256 * 1024;

/// The arbiter; see the module.
#[derive(Debug)]
pub struct EtcdArbiter {
    endpoints: Vec<String>,
    /// Index of the endpoint that answered last.
    preferred: usize,
    timeout: Duration,
    agent: ureq::Agent,
}

/// A key's value and revision.
struct Found {
    record: Record,
    mod_revision: u64,
}

impl EtcdArbiter {
    /// Uses the endpoints, such as `http://10.0.0.1:2379`; a call takes no longer than `timeout`.
    ///
    /// # Errors
    /// [`ArbiterError::BadRequest`] when there is no endpoint, or one that is not an HTTP address.
    pub fn new(endpoints: &[String], timeout: Duration) -> Result<Self, ArbiterError> {
        let bad = |reason: String| Err(ArbiterError::BadRequest { reason });
        if endpoints.is_empty() {
            return bad("etcd has no endpoint".to_owned());
        }
        if let Some(e) = endpoints.iter().find(|e| !e.starts_with("http://")) {
            return bad(format!("etcd endpoint {e:?} does not start with http://"));
        }
        let config = ureq::Agent::config_builder().http_status_as_error(false).proxy(None);
        Ok(Self {
            endpoints: endpoints.iter().map(|e| e.trim_end_matches('/').to_owned()).collect(),
            preferred: 0,
            timeout,
            agent: config.build().into(),
        })
    }

    /// Asks the endpoints in turn until one answers; the error says what each of them did.
    fn call(&mut self, path: &str, body: &Value, deadline: Instant) -> Result<Value, String> {
        let mut reasons = Vec::new();
        let count = self.endpoints.len();
        for i in 0..count {
            let index = (self.preferred + i) % count;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                reasons.push("time is up".to_owned());
                break;
            }
            // Each endpoint that is still to be tried gets an equal share of what is left.
            let share = left / u32::try_from(count - i).unwrap_or(u32::MAX);
            match self.post(&format!("{}{path}", self.endpoints[index]), body, share) {
                Ok(answer) => {
                    self.preferred = index;
                    return Ok(answer);
                }
                Err(reason) => reasons.push(format!("{}: {reason}", self.endpoints[index])),
            }
        }
        Err(reasons.join(", "))
    }

    fn post(&self, url: &str, body: &Value, timeout: Duration) -> Result<Value, String> {
        let request = self.agent.post(url).config().timeout_global(Some(timeout)).build();
        let mut answer = request.send_json(body).map_err(|e| one_line(&e))?;
        let status = answer.status();
        let text = answer
            .body_mut()
            .with_config()
            .limit(ANSWER_BYTES_MAX)
            .read_to_string()
            .map_err(|e| one_line(&e))?;
        if !status.is_success() {
            let start: String = flatten(&text).chars().take(200).collect();
            return Err(format!("HTTP status {}: {start}", status.as_u16()));
        }
        serde_json::from_str(&text).map_err(|e| format!("not JSON: {e}"))
    }

    fn fetch(&mut self, vm: &str, deadline: Instant) -> Result<Option<Found>, ArbiterError> {
        let body = json!({ "key": key(vm) });
        let answer = self
            .call("/v3/kv/range", &body, deadline)
            .map_err(|reason| ArbiterError::Unreachable { arbiter: self.describe(), reason })?;
        self.found(vm, &answer)
    }

    /// The key in an answer to a range request.
    fn found(&self, vm: &str, answer: &Value) -> Result<Option<Found>, ArbiterError> {
        let Some(kv) = answer.pointer("/kvs/0") else {
            // Any answer of etcd has a header; one without is from somebody else.
            let known = answer.get("header").is_some() || answer.get("count").is_some();
            return if known { Ok(None) } else { Err(self.malformed(vm, "not etcd's answer")) };
        };
        let text = kv.get("value").and_then(Value::as_str).unwrap_or_default();
        let bytes = base64::decode(text).ok_or_else(|| self.malformed(vm, "not base64"))?;
        let record = Record::decode(&bytes).map_err(|e| self.malformed(vm, &e))?;
        let revision = kv.get("mod_revision").and_then(Value::as_str).and_then(|r| r.parse().ok());
        let mod_revision = revision.ok_or_else(|| self.malformed(vm, "no mod_revision"))?;
        Ok(Some(Found { record, mod_revision }))
    }

    fn malformed(&self, vm: &str, reason: &str) -> ArbiterError {
        let place = format!("key {KEY_PREFIX}{vm}");
        ArbiterError::Malformed { arbiter: self.describe(), place, reason: reason.to_owned() }
    }
}

fn key(vm: &str) -> String {
    base64::encode(format!("{KEY_PREFIX}{vm}").as_bytes())
}

/// Put the record if the key's revision is still `revision`, else read the key.
fn transaction(vm: &str, revision: u64, new: &Record) -> Value {
    json!({
        "compare": [{
            "key": key(vm), "target": "MOD", "result": "EQUAL", "mod_revision": revision.to_string(),
        }],
        "success": [{ "request_put": { "key": key(vm), "value": base64::encode(&new.encode()) } }],
        "failure": [{ "request_range": { "key": key(vm) } }],
    })
}

impl Arbiter for EtcdArbiter {
    fn read(&mut self, vm: &str) -> Result<Option<Record>, ArbiterError> {
        check_vm(vm)?;
        let deadline = Instant::now() + self.timeout;
        Ok(self.fetch(vm, deadline)?.map(|f| f.record))
    }

    fn compare_and_set(
        &mut self,
        vm: &str,
        expected: Option<u64>,
        new: &Record,
    ) -> Result<CasOutcome, ArbiterError> {
        check_claim(vm, expected, new)?;
        let deadline = Instant::now() + self.timeout;
        let before = self.fetch(vm, deadline)?;
        let settled = |current: Option<Record>| match current {
            Some(record) if record == *new => CasOutcome::Won,
            current => CasOutcome::Lost { current },
        };
        if before.as_ref().map(|f| f.record.generation) != expected {
            return Ok(settled(before.map(|f| f.record)));
        }
        let revision = before.map_or(0, |f| f.mod_revision);
        let answer = self
            .call("/v3/kv/txn", &transaction(vm, revision, new), deadline)
            .map_err(|reason| ArbiterError::Ambiguous { arbiter: self.describe(), reason })?;
        if answer.get("succeeded").and_then(Value::as_bool) == Some(true) {
            return Ok(CasOutcome::Won);
        }
        let range = answer.pointer("/responses/0/response_range");
        let range = range.ok_or_else(|| ArbiterError::Ambiguous {
            arbiter: self.describe(),
            reason: "the answer to the transaction is not etcd's".to_owned(),
        })?;
        Ok(settled(self.found(vm, range)?.map(|f| f.record)))
    }

    fn describe(&self) -> String {
        format!("etcd {}", self.endpoints.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::process::{Child, Command, Stdio};
    use std::thread::sleep;

    use super::*;

    /// An etcd server of Debian's package etcd-server on loopback, ended with the test.
    struct Server {
        child: Child,
        url: String,
        _dir: tempfile::TempDir,
    }

    impl Drop for Server {
        fn drop(&mut self) {
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }

    fn free_url() -> String {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        format!("http://127.0.0.1:{port}")
    }

    fn start() -> Server {
        let dir = tempfile::tempdir().unwrap();
        let (url, peer) = (free_url(), free_url());
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(dir.path().join("data"))
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .env("ETCD_UNSUPPORTED_ARCH", "riscv64")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("this test needs `etcd`: install Debian's package etcd-server");
        let server = Server { child, url, _dir: dir };
        let mut arbiter = arbiter(&[&server.url]);
        let deadline = Instant::now() + Duration::from_secs(60);
        while arbiter.read("probe").is_err() {
            assert!(Instant::now() < deadline, "etcd does not answer at {}", server.url);
            sleep(Duration::from_millis(20));
        }
        server
    }

    fn arbiter(urls: &[&str]) -> EtcdArbiter {
        let urls: Vec<String> = urls.iter().map(|u| (*u).to_owned()).collect();
        EtcdArbiter::new(&urls, Duration::from_secs(20)).unwrap()
    }

    fn record(generation: u64, live: &str, nonce: u64) -> Record {
        Record {
            generation,
            live: Some(live.to_owned()),
            secondary: None,
            nonce,
            copies: Vec::new(),
        }
    }

    #[test]
    fn claims_on_a_real_etcd() {
        let server = start();
        let mut a = arbiter(&[&server.url]);
        assert_eq!(a.read("vm").unwrap(), None);
        assert_eq!(a.compare_and_set("vm", None, &record(1, "a", 1)).unwrap(), CasOutcome::Won);
        // The same record again: the answer was lost.
        assert_eq!(a.compare_and_set("vm", None, &record(1, "a", 1)).unwrap(), CasOutcome::Won);
        let lost = CasOutcome::Lost { current: Some(record(1, "a", 1)) };
        assert_eq!(a.compare_and_set("vm", None, &record(1, "b", 2)).unwrap(), lost);
        assert_eq!(a.compare_and_set("vm", Some(4), &record(5, "b", 2)).unwrap(), lost);
        assert_eq!(a.read("vm2").unwrap(), None);
        racing_claims_have_one_winner(&server.url);
        dead_endpoints_are_passed_over(&server.url);
        malformed_values_are_reported(&server.url);
    }

    fn racing_claims_have_one_winner(url: &str) {
        let wins: Vec<u64> = std::thread::scope(|s| {
            let threads: Vec<_> = (0..4).map(|t| s.spawn(move || race(url, t))).collect();
            threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
        });
        let mut sorted = wins;
        sorted.sort_unstable();
        assert_eq!(sorted, (1..=20).collect::<Vec<_>>());
    }

    fn race(url: &str, me: u64) -> Vec<u64> {
        let mut arbiter = arbiter(&[url]);
        let mut won = vec![];
        loop {
            let expected = arbiter.read("race").unwrap().map(|r| r.generation);
            let next = expected.map_or(1, |g| g + 1);
            if next > 20 {
                return won;
            }
            let new = record(next, "x", me);
            if arbiter.compare_and_set("race", expected, &new).unwrap() == CasOutcome::Won {
                won.push(next);
            }
        }
    }

    fn dead_endpoints_are_passed_over(url: &str) {
        let dead = free_url();
        let mut a = arbiter(&[&dead, url]);
        assert_eq!(a.compare_and_set("e", None, &record(1, "a", 1)).unwrap(), CasOutcome::Won);
    }

    fn malformed_values_are_reported(url: &str) {
        let mut a = arbiter(&[url]);
        let body = json!({ "key": key("bad"), "value": base64::encode(b"rubbish") });
        a.call("/v3/kv/put", &body, Instant::now() + Duration::from_secs(20)).unwrap();
        assert!(matches!(a.read("bad"), Err(ArbiterError::Malformed { .. })));
    }

    #[test]
    fn nobody_there_is_unreachable_and_silence_ends_in_time() {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let silent = format!("http://{}", silent.local_addr().unwrap());
        let urls = [free_url(), silent];
        let mut a = EtcdArbiter::new(&urls, Duration::from_millis(200)).unwrap();
        let started = Instant::now();
        assert!(matches!(a.read("vm"), Err(ArbiterError::Unreachable { .. })));
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn an_answer_lost_after_the_transaction_was_sent_is_ambiguous() {
        use std::io::{Read, Write};
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = std::thread::spawn(move || {
            let mut buf = [0u8; 4096];
            let (mut first, _) = listener.accept().unwrap();
            let _ = first.read(&mut buf).unwrap();
            let body = r#"{"header":{}}"#;
            let head = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: application/json\r\n";
            write!(first, "{head}content-length: {}\r\n\r\n{body}", body.len()).unwrap();
            drop(first);
            let (mut second, _) = listener.accept().unwrap();
            let _ = second.read(&mut buf).unwrap();
        });
        let mut a = arbiter(&[&url]);
        let e = a.compare_and_set("vm", None, &record(1, "a", 1)).unwrap_err();
        assert!(matches!(e, ArbiterError::Ambiguous { .. }), "{e}");
        server.join().unwrap();
    }

    #[test]
    fn endpoints_are_checked() {
        assert!(EtcdArbiter::new(&[], TIMEOUT_DEFAULT).is_err());
        assert!(EtcdArbiter::new(&["10.0.0.1:2379".into()], TIMEOUT_DEFAULT).is_err());
    }
}
