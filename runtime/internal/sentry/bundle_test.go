package sentry

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// prepared runs prepareFolder over a bundle with the configuration and returns what it made of it.
func prepared(t *testing.T, folder, config string) map[string]any {
	t.Helper()
	path := filepath.Join(folder, "config.json")
	if err := os.WriteFile(path, []byte(config), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := prepareFolder(folder, false); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var spec map[string]any
	if err := json.Unmarshal(raw, &spec); err != nil {
		t.Fatal(err)
	}
	return spec
}

func environment(spec map[string]any) []string {
	var list []string
	for _, entry := range spec["process"].(map[string]any)["env"].([]any) {
		list = append(list, entry.(string))
	}
	return list
}

func TestABundleGetsWhatProgramsNeedToSayTheirKeys(t *testing.T) {
	folder := t.TempDir()

	spec := prepared(t, folder, `{"ociVersion":"1.0.0","process":{"args":["x"],"env":["A=b"]},"unknown":{"big":12345678901234567890}}`)

	if got := environment(spec); !slices.Equal(got, []string{"A=b", "SSLKEYLOGFILE=/dev/kalium-keys", "PYTHONPATH=/run/kalium/pysite", "NODE_OPTIONS=--require=/run/kalium/keylog.cjs"}) {
		t.Errorf("environment %q", got)
	}
	device := spec["linux"].(map[string]any)["devices"].([]any)[0].(map[string]any)
	if device["path"] != "/dev/kalium-keys" || device["type"] != "c" || device["major"] != 60.0 || device["fileMode"] != float64(0o222) {
		t.Errorf("device %v", device)
	}
	mount := spec["mounts"].([]any)[0].(map[string]any)
	if mount["destination"] != "/run/kalium" || mount["source"] != filepath.Join(folder, "kalium") || !slices.Contains(mount["options"].([]any), any("ro")) {
		t.Errorf("mount %v", mount)
	}
	for _, name := range []string{"keylog.cjs", "pysite/sitecustomize.py"} {
		if info, err := os.Stat(filepath.Join(folder, "kalium", name)); err != nil || info.Mode().Perm() != 0o444 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	raw, err := os.ReadFile(filepath.Join(folder, "config.json"))
	if err != nil || !strings.Contains(string(raw), "12345678901234567890") {
		t.Errorf("a number changed: %s, %v", raw, err)
	}
	if info, err := os.Stat(filepath.Join(folder, "config.json")); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("mode %v, %v", info, err)
	}
}

func TestWhatTheImageSetsIsKeptOrReplaced(t *testing.T) {
	spec := prepared(t, t.TempDir(), `{"process":{"env":["SSLKEYLOGFILE=/tmp/k","PYTHONPATH=/app","NODE_OPTIONS=--max-old-space-size=99"]},
		"mounts":[{"destination":"/run/kalium/","source":"/elsewhere","type":"bind"},{"destination":"/tmp","type":"tmpfs"}],
		"linux":{"devices":[{"path":"/dev/kalium-keys","type":"c","major":1,"minor":3}]}}`)

	if got := environment(spec); !slices.Equal(got, []string{"SSLKEYLOGFILE=/dev/kalium-keys", "PYTHONPATH=/run/kalium/pysite:/app",
		"NODE_OPTIONS=--max-old-space-size=99 --require=/run/kalium/keylog.cjs"}) {
		t.Errorf("environment %q", got)
	}
	if mounts := spec["mounts"].([]any); len(mounts) != 2 || mounts[0].(map[string]any)["destination"] != "/tmp" {
		t.Errorf("mounts %v", mounts)
	}
	if devices := spec["linux"].(map[string]any)["devices"].([]any); len(devices) != 1 || devices[0].(map[string]any)["major"] != 60.0 {
		t.Errorf("devices %v", devices)
	}
}

func TestABundleThatTrustsTheGuardGetsTheAuthorityAndNoKeyLog(t *testing.T) {
	raw := `{"process":{"env":["SSLKEYLOGFILE=/k","SSL_CERT_FILE=/image/ca","JAVA_TOOL_OPTIONS=-Xmx64m","PYTHONPATH=/app"]}}`

	first, err := prepareSpec([]byte(raw), "/s", true)
	if err != nil {
		t.Fatal(err)
	}
	var spec map[string]any
	if err := json.Unmarshal(first, &spec); err != nil {
		t.Fatal(err)
	}
	if got := environment(spec); !slices.Equal(got, []string{
		"PYTHONPATH=/app", "SSL_CERT_FILE=/dev/kalium-ca", "REQUESTS_CA_BUNDLE=/dev/kalium-ca", "CURL_CA_BUNDLE=/dev/kalium-ca",
		"NODE_EXTRA_CA_CERTS=/dev/kalium-ca", "JAVA_TOOL_OPTIONS=-Xmx64m -Djavax.net.ssl.trustStore=/dev/kalium-ca.jks",
	}) {
		t.Errorf("environment %q", got)
	}
	if second, err := prepareSpec(first, "/s", true); err != nil || second != nil {
		t.Errorf("the second time: %s, %v", second, err)
	}
}

func TestPreparingABundleTwiceChangesNothing(t *testing.T) {
	folder := t.TempDir()
	prepared(t, folder, `{"process":{"env":["PYTHONPATH=/app"]}}`)
	path := filepath.Join(folder, "config.json")
	first, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}

	if err := prepareFolder(folder, false); err != nil {
		t.Fatal(err)
	}

	if second, err := os.ReadFile(path); err != nil || string(second) != string(first) {
		t.Errorf("first  %s\nsecond %s\n%v", first, second, err)
	}
}

func TestOnlyContainersOfFunctionsArePrepared(t *testing.T) {
	root := sandboxState(t, inPod(containerTypeSandbox, nil))
	for _, c := range []struct {
		id          string
		annotations map[string]string
		want        bool
	}{
		{ours, good, true},
		{ours, map[string]string{}, false},
		{sandboxID, inPod(containerTypeSandbox, nil), false},
		{ours, inPod(containerTypeContainer, nil), true},
	} {
		folder := bundle(t, c.annotations)
		if _, err := examine("--root", root, "create", "--bundle="+folder, c.id); err != nil {
			t.Fatal(err)
		}

		if _, err := os.Stat(filepath.Join(folder, "kalium")); (err == nil) != c.want {
			t.Errorf("%v: prepared %v", c.annotations, err == nil)
		}
	}
}

func TestABrokenConfigurationIsAnError(t *testing.T) {
	for _, config := range []string{`{`, `[]`, `{"linux":[]}`, `{"process":""}`, `{"process":{"env":[1]}}`, `{"mounts":{}}`} {
		if after, err := prepareSpec([]byte(config), "/s", false); err == nil {
			t.Errorf("%s: %s", config, after)
		}
	}
}
