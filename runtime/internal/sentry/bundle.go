package sentry

import (
	"bytes"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// What a guarded sandbox has that its bundle does not ask for, so that unmodified programs say the keys of their TLS
// connections: a device that takes key logs, the environment that leads there, and files for languages whose own key log
// is late or incomplete.
const (
	keysPath      = "/dev/kalium-keys"
	insertedPath  = "/run/kalium"
	pySite        = insertedPath + "/pysite"
	nodeRequire   = "--require=" + insertedPath + "/keylog.cjs"
	insertedInDir = "kalium" // in the bundle's folder
)

//go:embed inserted/keylog.cjs inserted/pysite/sitecustomize.py
var inserted embed.FS

// prepareBundle rewrites the bundle's config.json before runsc reads it, as runtimes for graphics cards do. Doing it again
// changes nothing. A pod's pause container, in which no function runs, is left as it is.
func (c *command) prepareBundle() error {
	if c.spec.Annotations[annotationFunction] == "" || c.isPodSandbox() {
		return nil
	}
	folder, err := filepath.Abs(c.value("bundle"))
	if err == nil {
		err = prepareFolder(folder, wantsTrust(c))
	}
	if err != nil {
		return failed("runtime.bundle", "prepare the bundle", err.Error(), "make the bundle's folder writable for root")
	}
	return nil
}

func prepareFolder(folder string, trusting bool) error {
	err := fs.WalkDir(inserted, "inserted", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative, err := filepath.Rel("inserted", path)
		if err != nil {
			return err
		}
		to := filepath.Join(folder, insertedInDir, relative)
		if d.IsDir() {
			// Whoever the program runs as reads them.
			return errors.Join(os.MkdirAll(to, 0o755), os.Chmod(to, 0o755))
		}
		content, err := inserted.ReadFile(path)
		if err != nil {
			return err
		}
		return replaceFile(to, content, 0o444)
	})
	if err != nil {
		return err
	}
	path := filepath.Join(folder, "config.json")
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	before, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	after, err := prepareSpec(before, filepath.Join(folder, insertedInDir), trusting)
	if err != nil || after == nil {
		return err
	}
	return replaceFile(path, after, info.Mode().Perm())
}

// replaceFile puts content there in one step: a reader sees the old file or the new one.
func replaceFile(path string, content []byte, mode fs.FileMode) error {
	file, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = file.Write(content)
	err = errors.Join(err, file.Chmod(mode), file.Close())
	if err == nil {
		err = os.Rename(file.Name(), path)
	}
	if err != nil {
		os.Remove(file.Name())
	}
	return err
}

// prepareSpec returns the configuration with what is inserted, or nil when it is there already. The rest of it is kept as
// it stands, also what we know nothing of. trusting: its programs trust the sandbox's authority, and log no keys.
func prepareSpec(raw []byte, source string, trusting bool) ([]byte, error) {
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.UseNumber() // a float64 has no room for every number
	var spec map[string]any
	if err := decoder.Decode(&spec); err != nil {
		return nil, err
	}
	linux, err := object(spec, "linux")
	if err != nil {
		return nil, err
	}
	process, err := object(spec, "process")
	if err != nil {
		return nil, err
	}
	err = errors.Join(
		replaceEntry(linux, "devices", "path", map[string]any{
			"path": keysPath, "type": "c", "major": keysMajor, "minor": keysMinor, "fileMode": 0o222, "uid": 0, "gid": 0,
		}),
		replaceEntry(spec, "mounts", "destination", map[string]any{
			"destination": insertedPath, "type": "bind", "source": source, "options": []string{"bind", "ro", "nosuid", "nodev"},
		}),
		setEnvironment(process, trusting),
	)
	if err != nil {
		return nil, err
	}
	after, err := json.Marshal(spec)
	if err != nil || bytes.Equal(after, bytes.TrimSpace(raw)) {
		return nil, err
	}
	return after, nil
}

func object(in map[string]any, name string) (map[string]any, error) {
	if in[name] == nil {
		in[name] = map[string]any{}
	}
	value, ok := in[name].(map[string]any)
	if !ok {
		return nil, fmt.Errorf("config.json: %s is no object", name)
	}
	return value, nil
}

func list(in map[string]any, name string) ([]any, error) {
	if in[name] == nil {
		return nil, nil
	}
	value, ok := in[name].([]any)
	if !ok {
		return nil, fmt.Errorf("config.json: %s is no list", name)
	}
	return value, nil
}

// replaceEntry puts entry at the end of a list, in the place of those with the same key.
func replaceEntry(in map[string]any, name, key string, entry map[string]any) error {
	before, err := list(in, name)
	if err != nil {
		return err
	}
	var after []any
	for _, other := range before {
		if other, ok := other.(map[string]any); ok {
			if path, _ := other[key].(string); filepath.Clean(path) == entry[key] {
				continue
			}
		}
		after = append(after, other)
	}
	in[name] = append(after, entry)
	return nil
}

// setEnvironment leads key logs to the device or, when they are trusting, programs to the sandbox's authority. Of what the
// image says, paths of ours replace the value of a variable, and lists and options keep it beside ours.
func setEnvironment(process map[string]any, trusting bool) error {
	before, err := list(process, "env")
	if err != nil {
		return err
	}
	values := map[string]string{}
	ours := keyLogEnvironment
	if trusting {
		ours = trustEnvironment
	}
	var after []any
	for _, entry := range before {
		text, ok := entry.(string)
		if !ok {
			return errors.New("config.json: an environment variable is no text")
		}
		name, value, _ := strings.Cut(text, "=")
		if slices.ContainsFunc(ours, func(v variable) bool { return v.name == name }) {
			values[name] = value
		} else if name != keyLogVariable {
			after = append(after, text)
		}
	}
	for _, v := range ours {
		after = append(after, v.name+"="+v.merge(values[v.name]))
	}
	process["env"] = after
	return nil
}

// variable is one of the environment that is ours, beside what the image says.
type variable struct {
	name  string
	merge func(before string) string
}

const keyLogVariable = "SSLKEYLOGFILE"

var keyLogEnvironment = []variable{
	{keyLogVariable, always(keysPath)}, {"PYTHONPATH", inFront(pySite)}, {"NODE_OPTIONS", besides(nodeRequire)},
}

// trustEnvironment is what OpenSSL and Go, requests, curl, Node.js and Java read.
var trustEnvironment = []variable{
	{"SSL_CERT_FILE", always(trustPath)}, {"REQUESTS_CA_BUNDLE", always(trustPath)}, {"CURL_CA_BUNDLE", always(trustPath)},
	{"NODE_EXTRA_CA_CERTS", always(trustPath)}, {"JAVA_TOOL_OPTIONS", besides("-Djavax.net.ssl.trustStore=" + trustJavaPath)},
}

func always(value string) func(string) string { return func(string) string { return value } }

// inFront puts a folder in front of a list of them.
func inFront(folder string) func(string) string {
	return func(before string) string {
		if before == folder || strings.HasPrefix(before, folder+":") {
			return before
		}
		return strings.TrimSuffix(folder+":"+before, ":") // an empty part would be the working directory
	}
}

// besides puts an option behind others.
func besides(option string) func(string) string {
	return func(before string) string {
		if strings.Contains(" "+before+" ", " "+option+" ") {
			return before
		}
		return strings.TrimPrefix(before+" "+option, " ")
	}
}
