package agent

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"kalium.dev/kalium/runtime/internal/policy"
)

const (
	versionsFormat = "kalium-versions/v1"
	versionsFile   = "versions.json"
)

// versions remembers the highest version of each app's policy that this node has seen, so that an old policy with a
// good signature cannot be brought back. It outlives restarts.
type versions struct {
	path string

	mu   sync.Mutex
	seen map[string]seenVersion // guarded by mu
}

type seenVersion struct {
	Version int    `json:"version"`
	SHA256  string `json:"sha256"` // of the compiled policy
}

type versionsDocument struct {
	Format string                 `json:"format"`
	Apps   map[string]seenVersion `json:"apps"`
}

// openVersions reads the file in dir. A file that is not there is an empty one: the first start of a node. One that
// does not parse stops the agent, because starting without it would forget what was seen.
func openVersions(dir string) (*versions, error) {
	v := &versions{path: filepath.Join(dir, versionsFile), seen: map[string]seenVersion{}}
	refuse := func(err error) error {
		return environment("agent.versions", "cannot read the versions seen so far from "+v.path,
			"restore the file from a backup; only the operator may delete it, and then old policies are accepted again", "%v", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, refuse(err)
	}
	data, err := readBounded(v.path, versionsBytesMax)
	if errors.Is(err, fs.ErrNotExist) {
		return v, nil
	}
	if err != nil {
		return nil, refuse(err)
	}
	var document versionsDocument
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&document); err != nil {
		return nil, refuse(err)
	}
	if _, err := decoder.Token(); err != io.EOF || document.Format != versionsFormat {
		return nil, refuse(fmt.Errorf("format %q, not %q alone", document.Format, versionsFormat))
	}
	for app, seen := range document.Apps {
		if digest, err := hex.DecodeString(seen.SHA256); err != nil || len(digest) != 32 || seen.Version < 1 {
			return nil, refuse(fmt.Errorf("the entry of app %q does not parse", app))
		}
		v.seen[app] = seen
	}
	return v, nil
}

// raise records p, or says why it must not come into force: it is older than what was seen, or another policy of the
// same version. When raise returns nil the version is on disk.
func (v *versions) raise(p *policy.Policy) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	now := seenVersion{Version: p.Version, SHA256: hex.EncodeToString(p.SHA256[:])}
	before, known := v.seen[p.App]
	switch {
	case !known && len(v.seen) == appsMax:
		return fmt.Errorf("policies of %d apps are known, no more are taken", appsMax)
	case known && now.Version < before.Version:
		return fmt.Errorf("version %d, and version %d was seen", now.Version, before.Version)
	case known && now.Version == before.Version && now.SHA256 != before.SHA256:
		return fmt.Errorf("version %d with another content than before", now.Version)
	case known && now == before:
		return nil
	}
	next := map[string]seenVersion{p.App: now}
	for app, seen := range v.seen {
		if app != p.App {
			next[app] = seen
		}
	}
	if err := writeDurably(v.path, versionsDocument{Format: versionsFormat, Apps: next}); err != nil {
		return fmt.Errorf("the version cannot be recorded: %w", err)
	}
	v.seen = next
	return nil
}

// writeDurably replaces the file at path by the JSON of value: after a crash either the old or the new content is there.
func writeDurably(path string, value any) error {
	data, err := json.Marshal(value)
	if err != nil {
		return err
	}
	temporary := path + ".new"
	file, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(append(data, '\n'))
	if err == nil {
		err = file.Sync()
	}
	if closed := file.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(temporary, path)
	}
	if err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
