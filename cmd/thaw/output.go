package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// output prints data as a table for people or as JSON for programs.
type output struct{ json bool }

func (o *output) register(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON")
}

// listing is a command "list" of no arguments, whose run prints to out.
func listing(short, example string, run func(cmd *cobra.Command, out *output) error) *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use: "list", Short: short, Args: noArgs,
		Example: example,
		RunE:    func(cmd *cobra.Command, _ []string) error { return run(cmd, &out) },
	}
	out.register(cmd)
	return cmd
}

func (o *output) print(w io.Writer, data any, table func(*tabwriter.Writer)) error {
	if o.json {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(complete(data))
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	table(tw)
	return tw.Flush()
}

// complete makes a message print all its fields, with numbers as numbers and lists
// that are empty as such: a program that reads them must not guess what is missing.
// Other data stays as it is.
func complete(data any) any {
	if m, ok := data.(proto.Message); ok {
		return completeMessage(m.ProtoReflect())
	}
	v := reflect.ValueOf(data)
	if v.Kind() != reflect.Slice || !v.Type().Elem().Implements(reflect.TypeFor[proto.Message]()) {
		return data
	}
	list := make([]any, v.Len())
	for i := range list {
		list[i] = complete(v.Index(i).Interface())
	}
	return list
}

// object is a JSON object whose fields stay in order.
type object struct {
	names  []string
	values []any
}

func (o object) MarshalJSON() ([]byte, error) {
	if len(o.names) == 0 {
		return []byte("{}"), nil
	}
	var b bytes.Buffer
	for i, name := range o.names {
		value, err := json.Marshal(o.values[i])
		if err != nil {
			return nil, err
		}
		b.WriteByte("{,"[min(i, 1)])
		fmt.Fprintf(&b, "%q:%s", name, value)
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

// completeMessage knows the kinds of fields that the attacher's contract uses.
func completeMessage(m protoreflect.Message) object {
	var o object
	for i := range m.Descriptor().Fields().Len() {
		f := m.Descriptor().Fields().Get(i)
		value := func(v protoreflect.Value) any {
			if f.Message() != nil {
				return completeMessage(v.Message())
			}
			return v.Interface()
		}
		o.names = append(o.names, string(f.Name()))
		if !f.IsList() {
			o.values = append(o.values, value(m.Get(f)))
			continue
		}
		list := m.Get(f).List()
		all := make([]any, list.Len())
		for n := range all {
			all[n] = value(list.Get(n))
		}
		o.values = append(o.values, all)
	}
	return o
}

func row(w io.Writer, cells ...any) {
	text := make([]string, len(cells))
	for i, c := range cells {
		text[i] = fmt.Sprint(c)
	}
	fmt.Fprintln(w, strings.Join(text, "\t"))
}

func bytesText(n int64) string { return units.BytesSize(float64(n)) }

func ageText(unixNanos int64) string {
	if unixNanos == 0 {
		return "-"
	}
	return units.HumanDuration(time.Since(time.Unix(0, unixNanos))) + " ago"
}

// count writes "1 block", "2 blocks".
func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprint(n, " ", many)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
