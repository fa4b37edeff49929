package kill

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"sort"
	"strings"
	"time"

	"go.etcd.io/bbolt"

	"github.com/thaw-project/thaw/spdk"
)

// state is all that a chain holds, in words that mean the same in every run.
type state map[string]string

// diff says in what two states differ.
func (s state) diff(want state) string {
	var lines []string
	keys := make(map[string]bool)
	for k := range s {
		keys[k] = true
	}
	for k := range want {
		keys[k] = true
	}
	for k := range keys {
		if s[k] != want[k] {
			lines = append(lines, fmt.Sprintf("%s:\n  have %s\n  want %s", k, cmp.Or(s[k], "nothing"), cmp.Or(want[k], "nothing")))
		}
	}
	sort.Strings(lines)
	return strings.Join(lines, "\n")
}

// add puts an object's description under a key, and says when there are two.
func (s state) add(key string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	for s[key] != "" {
		key += " again"
	}
	s[key] = string(raw)
	return nil
}

// object is a JSON object of a target's answer.
type object = map[string]any

// targetState asks a target for all it has.
func targetState(ctx context.Context, prefix string, client *spdk.Client) (state, error) {
	s := state{}
	call := func(method string, params any, key func(object) string, plain func(object)) error {
		var list []object
		if err := client.Call(ctx, method, params, &list); err != nil {
			return err
		}
		for _, o := range list {
			if plain != nil {
				plain(o)
			}
			// The attacher's way to lvols that it writes to itself: it keeps it once it had
			// one open, which is nothing to anybody while there is nothing on it.
			if list, ok := o["namespaces"].([]any); ok && len(list) == 0 && strings.Contains(fmt.Sprint(o["nqn"]), ":-attacher-") {
				continue
			}
			if err := s.add(prefix+key(o), o); err != nil {
				return err
			}
		}
		return nil
	}
	name := func(what, field string) func(object) string {
		return func(o object) string { return what + " " + fmt.Sprint(o[field]) }
	}
	err := errors.Join(
		call("bdev_get_bdevs", nil, name("bdev", "name"), func(o object) {
			// A bdev of a file has a new UUID whenever it is made.
			if o["product_name"] == "AIO disk" {
				delete(o, "uuid")
				delete(o, "aliases")
			}
		}),
		call("bdev_lvol_get_lvstores", nil, name("lvstore", "name"), nil),
		call("nvmf_get_transports", nil, name("transport", "trtype"), nil),
		call("nvmf_get_subsystems", nil, name("subsystem", "nqn"), func(o object) {
			for _, field := range []string{"hosts", "listen_addresses", "namespaces"} {
				if list, ok := o[field].([]any); ok {
					slices.SortFunc(list, func(a, b any) int { return cmp.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
				}
			}
		}),
		call("bdev_nvme_get_controllers", nil, name("controller", "name"), func(o object) {
			paths, _ := o["ctrlrs"].([]any)
			for _, p := range paths {
				if p, ok := p.(object); ok {
					delete(p, "cntlid") // of the connection
				}
			}
		}),
	)
	var methods []string
	if err == nil {
		err = client.Call(ctx, "rpc_get_methods", nil, &methods)
	}
	if err == nil && slices.Contains(methods, "thaw_nbd_get_exports") {
		err = call("thaw_nbd_get_exports", nil, func(o object) string { return "nbd export " + fmt.Sprint(o["bdev_name"]) }, func(o object) {
			delete(o, "connections") // QEMU connects again with the next request
		})
	}
	return s.named(), err
}

// named writes the names of lvols instead of the UUIDs that they were given.
func (s state) named() state {
	var pairs []string
	for key, text := range s {
		var o struct {
			Product string   `json:"product_name"`
			Aliases []string `json:"aliases"`
			UUID    string   `json:"uuid"`
		}
		if strings.Contains(key, "bdev ") && json.Unmarshal([]byte(text), &o) == nil && o.Product == "Logical Volume" && len(o.Aliases) > 0 {
			pairs = append(pairs, o.UUID, "("+o.Aliases[0]+")", strings.ReplaceAll(o.UUID, "-", ""), "("+o.Aliases[0]+")",
				strings.ToUpper(strings.ReplaceAll(o.UUID, "-", "")), "("+o.Aliases[0]+")")
		}
	}
	r := strings.NewReplacer(pairs...)
	out := state{}
	for key, text := range s {
		out[r.Replace(key)] = r.Replace(text)
	}
	return out
}

// databaseState reads a bbolt database that another process has open, from a copy: nobody
// writes to it when a chain is at rest.
func databaseState(prefix, path, scratch string) (state, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(scratch, raw, 0o600); err != nil {
		return nil, err
	}
	defer os.Remove(scratch)
	db, err := bbolt.Open(scratch, 0o600, &bbolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		return nil, err
	}
	defer db.Close()
	s := state{}
	return s, db.View(func(tx *bbolt.Tx) error {
		return tx.ForEach(func(bucket []byte, b *bbolt.Bucket) error {
			return b.ForEach(func(k, v []byte) error {
				var o object
				if json.Unmarshal(v, &o) == nil {
					maps := []object{o}
					for len(maps) > 0 {
						for field, x := range maps[0] {
							n, _ := x.(float64)
							inner, nested := x.(object)
							switch {
							case nested:
								maps = append(maps, inner)
							case n > 1e18, field == "attachment", field == "id" && string(bucket) == "attachments":
								delete(maps[0], field) // a time, or random
							}
						}
						maps = maps[1:]
					}
					return s.add(fmt.Sprintf("%s%s %q", prefix, bucket, k), o)
				}
				return s.add(fmt.Sprintf("%s%s %q", prefix, bucket, k), string(bytes.ToValidUTF8(v, []byte("?"))))
			})
		})
	})
}

func (s state) merge(o state) {
	for k, v := range o {
		s[k] = v
	}
}
