package agent

import (
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/frame"
)

const goodConfig = `{"node":"node-0","guard_socket":"/run/kalium/guard.sock","register_socket":"/run/kalium/register.sock",
"controllers":[{"address":"127.0.0.1:5000","name":"controller-0"},{"address":"other:5000","name":"controller-1"}],
"tls":{"ca":"/e/ca","cert":"/e/crt","key":"/e/key"},
"operator_key":"/e/pub","state_dir":"/s","verdict_log":"/l","timing_log":"/t","names":{"gateway":["10.137.0.1"]},
"incoming":{"port":8080,"sources":["10.137.0.1/32"],"health_path":"/_/health"},"lease_ms":60000,
"audit":{"log":"/a","key":"/e/audit","fsync":"interval","max_mib":64},"metrics":{"listen":"127.0.0.1:5002"}}`

func TestTheConfigurationIsRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.json")
	if err := os.WriteFile(path, []byte(goodConfig), 0o600); err != nil {
		t.Fatal(err)
	}

	config, err := LoadConfig(path)

	if err != nil || config.Node != "node-0" || config.Controllers[1].Name != "controller-1" || config.TLS.Key != "/e/key" ||
		config.Audit.MaxMiB != 64 || config.Metrics.Listen != "127.0.0.1:5002" || config.Incoming.Port != 8080 || config.peerUID != 0 {
		t.Errorf("%#v, %v", config, err)
	}
}

func TestAConfigurationThatIsNotMeantIsRefused(t *testing.T) {
	for name, c := range map[string]struct{ old, new, text string }{
		"an unknown field":             {`"node":`, `"nodes":"x","node":`, `unknown field "nodes"`},
		"an unknown field inside":      {`"port":`, `"ports":1,"port":`, `unknown field "ports"`},
		"no node":                      {`"node":"node-0",`, ``, "node is"},
		"a relative path":              {`"/run/kalium/guard.sock"`, `"guard.sock"`, "guard_socket is"},
		"a field in other letters":     {`"node":`, `"Node":`, `unknown field "Node"`},
		"a letter that folds":          {`"lease_ms"`, `"lea\u017fe_ms"`, "unknown field"},
		"a field twice":                {`"node":`, `"node":"x","node":`, `"node" is there twice`},
		"a field inside twice":         {`"port":`, `"port":1,"port":`, `"port" is there twice`},
		"the controller of old":        {`"controllers":[`, `"controller":{},"controllers":[`, `unknown field "controller"`},
		"no controller":                {`[{"address":"127.0.0.1:5000","name":"controller-0"},{"address":"other:5000","name":"controller-1"}]`, `[]`, "controllers has 0 entries"},
		"nine controllers":             {`{"address":"other`, strings.Repeat(`{"address":"x:1","name":"x"},`, 7) + `{"address":"other`, "controllers has 9 entries"},
		"an address without a port":    {`127.0.0.1:5000`, `127.0.0.1`, "controllers[0].address is"},
		"an address without a host":    {`other:5000`, `:5000`, "controllers[1].address is"},
		"a port that is none":          {`other:5000`, `other:0`, "controllers[1].address is"},
		"an address twice":             {`other:5000`, `127.0.0.1:5000`, "which an entry before it has"},
		"a controller without a name":  {`"name":"controller-1"`, `"name":""`, "controllers[1].name is"},
		"no tls":                       {`"tls":{"ca":"/e/ca","cert":"/e/crt","key":"/e/key"},`, ``, "tls.ca is"},
		"a relative key":               {`"/e/key"`, `"key"`, "tls.key is"},
		"an audit log of nobody":       {`"key":"/e/audit",`, ``, "audit.key is"},
		"an audit log nowhere":         {`"/a"`, `"a"`, "audit.log is"},
		"another fsync":                {`"interval"`, `"sometimes"`, "audit.fsync is"},
		"no size of the audit log":     {`,"max_mib":64`, ``, "audit.max_mib is 0"},
		"metrics at a name":            {`"127.0.0.1:5002"`, `"localhost:5002"`, "metrics.listen is"},
		"metrics without a port":       {`"127.0.0.1:5002"`, `"127.0.0.1"`, "metrics.listen is"},
		"a name in upper case":         {`"gateway"`, `"Gateway"`, `unknown field "Gateway": the names of fields and hosts`},
		"a name with a final dot":      {`"gateway"`, `"gateway."`, "names has"},
		"a name without an address":    {`["10.137.0.1"]}`, `[]}`, "names.gateway has 0 addresses"},
		"an address that is none":      {`["10.137.0.1"]}`, `["10.137.0"]}`, "not an IPv4 address"},
		"an IPv6 address":              {`["10.137.0.1"]}`, `["::1"]}`, "not an IPv4 address"},
		"port 0":                       {`8080`, `0`, "incoming.port is 0"},
		"no source":                    {`["10.137.0.1/32"]`, `[]`, "incoming.sources has 0"},
		"a source that is no range":    {`10.137.0.1/32`, `10.137.0.1`, "not an IPv4 range"},
		"a health path with a query":   {`/_/health`, `/_/health?x`, "not a plain path"},
		"a health path without a root": {`/_/health`, `_/health`, "not a plain path"},
		"no lease":                     {`60000`, `0`, "lease_ms is 0"},
		"relative roots":               {`"lease_ms"`, `"tls_roots":"r","lease_ms"`, "tls_roots is"},
		"a lease of a day":             {`60000`, `86400000`, "lease_ms is 86400000"},
		"a negative wait":              {`"lease_ms"`, `"admit_wait_ms":-1,"lease_ms"`, "admit_wait_ms is -1"},
		"a wait of a minute":           {`"lease_ms"`, `"admit_wait_ms":60000,"lease_ms"`, "admit_wait_ms is 60000"},
		"a text for a number":          {`60000`, `"60000"`, "cannot unmarshal"},
		"bytes behind it":              {`:5002"}}`, `:5002"}} {}`, "bytes follow"},
		"JSON that is cut":             {`:5002"}}`, `:5002"}`, "not the JSON"},
		"nothing but a list":           {goodConfig, `[]`, "not the JSON"},
	} {
		changed := strings.Replace(goodConfig, c.old, c.new, 1)
		if changed == goodConfig {
			t.Fatalf("%s: the case changes nothing", name)
		}

		_, err := parseConfig([]byte(changed))

		if err == nil || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAuditAndMetricsMayBeLeftOut(t *testing.T) {
	short := strings.Replace(goodConfig, `,
"audit":{"log":"/a","key":"/e/audit","fsync":"interval","max_mib":64},"metrics":{"listen":"127.0.0.1:5002"}`, ``, 1)

	config, err := parseConfig([]byte(short))

	if err != nil || config.Audit != nil || config.Metrics != nil {
		t.Errorf("%#v, %v", config, err)
	}
}

func TestAFileThatCannotBeReadSaysWhatToDo(t *testing.T) {
	_, err := LoadConfig(filepath.Join(t.TempDir(), "absent"))

	var known *Error
	if !errors.As(err, &known) || known.Code != "agent.config" || known.Exit != ExitEnvironment || !strings.Contains(err.Error(), "\nnext: ") {
		t.Errorf("%v", err)
	}
}

func TestOnlyAnEd25519KeyIsAnOperatorsKey(t *testing.T) {
	dir := t.TempDir()
	cert, private := newAuthority(t).issue(roleAgent, "x")
	for name, data := range map[string][]byte{
		"a certificate": cert, "a private key": private, "nothing": nil,
		"rubbish in PEM": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: []byte("x")}),
	} {
		path := filepath.Join(dir, "key")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := loadOperatorKey(path); err == nil || !strings.HasPrefix(err.Error(), "error[agent.operator_key]: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTheAgentDoesNotStartWithWhatItCannotUse(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*site)
		code   string
	}{
		"a lost operator's key":       {func(s *site) { s.config.OperatorKey += ".lost" }, "agent.operator_key"},
		"a log in no folder":          {func(s *site) { s.config.VerdictLog = s.dir + "/no/folder" }, "agent.verdict_log"},
		"a socket in no folder":       {func(s *site) { s.config.GuardSocket = s.dir + "/no/folder" }, "agent.socket"},
		"a file in a socket's place":  {func(s *site) { s.write("register.sock", nil) }, "agent.socket"},
		"versions that are cut short": {func(s *site) { s.writeVersions(`{"format":"kalium-versions/v1","apps":{"a"`) }, "agent.versions"},
		"versions of another format":  {func(s *site) { s.writeVersions(`{"format":"v2","apps":{}}`) }, "agent.versions"},
		"an empty file of versions":   {func(s *site) { s.writeVersions("") }, "agent.versions"},
		"a version that is no digest": {func(s *site) {
			s.writeVersions(`{"format":"kalium-versions/v1","apps":{"a":{"version":1,"sha256":"x"}}}`)
		}, "agent.versions"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			c.change(s)

			err := run(t.Context(), s.config, newLogger(s.log), s.reopen, s.resolve)

			var known *Error
			if !errors.As(err, &known) || known.Code != c.code || known.Exit != ExitEnvironment {
				t.Errorf("%v", err)
			}
		})
	}
}

func (s *site) writeVersions(text string) {
	if err := os.MkdirAll(s.config.StateDir, 0o700); err != nil {
		s.t.Fatal(err)
	}
	s.write("state/"+versionsFile, []byte(text))
}

func TestVersionsAreWrittenBeforeAPolicyComesIntoForce(t *testing.T) {
	s := newSite(t)
	s.startConnected()

	var document versionsDocument
	data, err := os.ReadFile(filepath.Join(s.config.StateDir, versionsFile))
	if err == nil {
		err = json.Unmarshal(data, &document)
	}

	if err != nil || document.Apps["shop"].Version != 1 || document.Format != versionsFormat {
		t.Errorf("%s, %v", data, err)
	}
}

func TestAVersionThatCannotBeRecordedDoesNotComeIntoForce(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	// A folder in the place of the temporary file: the disk refuses.
	if err := os.Mkdir(filepath.Join(s.config.StateDir, versionsFile+".new"), 0o700); err != nil {
		t.Fatal(err)
	}

	s.controller.push(&frame.Policy{App: "shop", Policy: s.sign(compiled("shop", 2))})

	s.until("it is refused", func() bool { return strings.Contains(s.log.String(), "the version cannot be recorded") })
	if got := s.policyVersion("shop"); got != 1 {
		t.Errorf("version %d is in force", got)
	}
}

func TestStatusSpeaksToPeopleAndPrograms(t *testing.T) {
	s := newSite(t)
	s.another()
	s.startConnected()
	s.register("c2", "ship")
	g := s.guard("c1", "pay")
	g.send(0, &frame.Mode{Mode: "audit", Version: 1})
	first, second := s.config.Controllers[0].Address, s.config.Controllers[1].Address
	var people, programs strings.Builder
	s.until("the mode is known", func() bool { return strings.Contains(s.ask(`{"op":"status"}`), `"audit"`) })

	err := Status(s.config, &people, false)
	jsonErr := Status(s.config, &programs, true)

	if want := "controller controller at " + first + ": connected\ncontroller controller at " + second + ": not connected\npolicy shop: version 1\n" +
		"instance c1 of shop/pay: audit by version 1\ninstance c2 of shop/ship: no guard\n"; err != nil || people.String() != want {
		t.Errorf("%q, %v", people.String(), err)
	}
	if want := `{"ok":true,"controller":true,"controllers":[{"address":"` + first + `","name":"controller","connected":true},{"address":"` + second +
		`","name":"controller","connected":false}],"policies":{"shop":1},"instances":[{"container":"c1","app":"shop","function":"pay","mode":"audit","version":1},` +
		`{"container":"c2","app":"shop","function":"ship","mode":"none","version":0}]}` + "\n"; jsonErr != nil || programs.String() != want {
		t.Errorf("%q, %v", programs.String(), jsonErr)
	}
}

func TestStatusSaysNoWithoutAControllerAndFailsWithoutAnAgent(t *testing.T) {
	s := newSite(t)
	var out strings.Builder
	var known *Error

	if err := Status(s.config, &out, false); !errors.As(err, &known) || known.Code != "agent.unreachable" || known.Exit != ExitEnvironment {
		t.Errorf("without an agent: %v", err)
	}
	s.start()
	if err := Status(s.config, &out, false); !errors.As(err, &known) || known.Code != "agent.controller_away" || known.Exit != ExitNo {
		t.Errorf("without a controller: %v", err)
	}
}
