package rpc

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"strconv"
	"strings"
)

// ParamError says which parameter was wrong. Unknown is set when the method has no
// parameter of that name.
type ParamError struct {
	Name    string
	Unknown bool
	Detail  string
}

func (e *ParamError) Error() string {
	if e.Name == "" {
		return e.Detail
	}
	return fmt.Sprintf("parameter %q: %s", e.Name, e.Detail)
}

type member struct {
	name string
	raw  json.RawMessage
}

// object splits a JSON object. A name that comes twice is refused, as SPDK does: which
// of two values a reader believes is how filters are tricked.
func object(raw json.RawMessage) ([]member, error) {
	d := json.NewDecoder(bytes.NewReader(raw))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, &ParamError{Detail: "not an object"}
	}
	var list []member
	seen := map[string]bool{}
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return nil, &ParamError{Detail: err.Error()}
		}
		name, _ := t.(string)
		if seen[name] {
			return nil, &ParamError{Name: clip(name), Detail: "given twice"}
		}
		seen[name] = true
		m := member{name: name}
		if err := d.Decode(&m.raw); err != nil {
			return nil, &ParamError{Name: clip(name), Detail: err.Error()}
		}
		list = append(list, m)
	}
	return list, nil
}

// clip bounds what a client wrote before it goes into a message.
func clip(s string) string { return s[:min(len(s), 64)] }

// Decode fills the struct that v points to from an object of parameters, which is nil
// when the request had none. The struct's json tags name the parameters; those with
// omitempty may be missing. Names are matched exactly, types are not converted, and a
// parameter that the struct does not have is an error: all errors are *ParamError.
func Decode(params json.RawMessage, v any) error {
	if params == nil {
		params = json.RawMessage("{}")
	}
	return decodeStruct(params, reflect.ValueOf(v).Elem())
}

func decodeStruct(raw json.RawMessage, v reflect.Value) error {
	list, err := object(raw)
	if err != nil {
		return err
	}
	given := map[string]json.RawMessage{}
	for _, m := range list {
		given[m.name] = m.raw
	}
	for i := range v.NumField() {
		name, options, _ := strings.Cut(v.Type().Field(i).Tag.Get("json"), ",")
		raw, ok := given[name]
		if !ok {
			if options != "omitempty" {
				return &ParamError{Name: name, Detail: "missing"}
			}
			continue
		}
		delete(given, name)
		if err := decodeValue(raw, v.Field(i)); err != nil {
			if e, ok := err.(*ParamError); ok && e.Name != "" {
				e.Name = name + "." + e.Name
				return e
			}
			return &ParamError{Name: name, Detail: err.Error()}
		}
	}
	for _, m := range list { // in the client's order
		if _, ok := given[m.name]; ok {
			return &ParamError{Name: clip(m.name), Unknown: true, Detail: "unknown"}
		}
	}
	return nil
}

func decodeValue(raw json.RawMessage, v reflect.Value) error {
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		return decodeValue(raw, v.Elem())
	case reflect.Struct:
		return decodeStruct(raw, v)
	case reflect.String:
		if raw[0] != '"' {
			return fmt.Errorf("not a string")
		}
		if err := json.Unmarshal(raw, v.Addr().Interface()); err != nil {
			return err
		}
		if strings.Contains(v.String(), "\x00") { // as SPDK, whose strings end there
			return fmt.Errorf("has a zero byte")
		}
		return nil
	case reflect.Bool:
		if raw[0] != 't' && raw[0] != 'f' {
			return fmt.Errorf("not a boolean")
		}
		return json.Unmarshal(raw, v.Addr().Interface())
	case reflect.Int, reflect.Int32, reflect.Int64:
		n, err := integer(raw)
		if err != nil || v.OverflowInt(n) {
			return fmt.Errorf("not an integer of %d bits", v.Type().Bits())
		}
		v.SetInt(n)
	case reflect.Uint16, reflect.Uint32, reflect.Uint64:
		n, err := natural(raw)
		if err != nil || v.OverflowUint(n) {
			return fmt.Errorf("not a natural number of %d bits", v.Type().Bits())
		}
		v.SetUint(n)
	case reflect.Slice:
		var list []json.RawMessage
		if raw[0] != '[' || json.Unmarshal(raw, &list) != nil {
			return fmt.Errorf("not an array")
		}
		v.Set(reflect.MakeSlice(v.Type(), len(list), len(list)))
		for i := range list {
			if err := decodeValue(list[i], v.Index(i)); err != nil {
				return err
			}
		}
	default:
		panic("rpc: no parameter can be a " + v.Kind().String())
	}
	return nil
}

// natural accepts 4096, 4096.0 and 4.096e3, as SPDK does.
func natural(raw []byte) (uint64, error) {
	n, err := strconv.ParseUint(string(raw), 10, 64)
	if err == nil {
		return n, nil
	}
	f, err := whole(raw)
	if err != nil || f < 0 {
		return 0, strconv.ErrSyntax
	}
	return uint64(f), nil
}

func integer(raw []byte) (int64, error) {
	n, err := strconv.ParseInt(string(raw), 10, 64)
	if err == nil {
		return n, nil
	}
	f, err := whole(raw)
	return int64(f), err
}

// whole reads a number that is written with a point or an exponent. Beyond 2^53 it may
// have been rounded, so it is refused.
func whole(raw []byte) (float64, error) {
	f, err := strconv.ParseFloat(string(raw), 64)
	if err != nil || !bytes.ContainsAny(raw, ".eE") || f != math.Trunc(f) || math.Abs(f) > 1<<53 {
		return 0, strconv.ErrSyntax
	}
	return f, nil
}
