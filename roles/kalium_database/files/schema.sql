-- The application's eight tables in their first state, one row each. Applied when the site is made and by the experiments between
-- blocks: tables that are there are emptied and filled again, in one transaction. It is read by MariaDB and MySQL alike.

CREATE TABLE IF NOT EXISTS authenticationName (rowkey VARCHAR(256) NOT NULL PRIMARY KEY, rowvalues MEDIUMTEXT NULL) ENGINE=InnoDB DEFAULT CHARSET=latin1;
CREATE TABLE IF NOT EXISTS creditCardsName (rowkey VARCHAR(256) NOT NULL PRIMARY KEY, rowvalues MEDIUMTEXT NULL) ENGINE=InnoDB DEFAULT CHARSET=latin1;
CREATE TABLE IF NOT EXISTS photoAssignmentTable (rowkey VARCHAR(256) NOT NULL PRIMARY KEY, rowvalues MEDIUMTEXT NULL) ENGINE=InnoDB DEFAULT CHARSET=latin1;
CREATE TABLE IF NOT EXISTS photoRegistrationTable (rowkey VARCHAR(256) NOT NULL PRIMARY KEY, rowvalues MEDIUMTEXT NULL) ENGINE=InnoDB DEFAULT CHARSET=latin1;
CREATE TABLE IF NOT EXISTS productCatalog (rowkey VARCHAR(256) NOT NULL PRIMARY KEY, rowvalues MEDIUMTEXT NULL) ENGINE=InnoDB DEFAULT CHARSET=latin1;
CREATE TABLE IF NOT EXISTS productCategory (rowkey VARCHAR(256) NOT NULL PRIMARY KEY, rowvalues MEDIUMTEXT NULL) ENGINE=InnoDB DEFAULT CHARSET=latin1;
CREATE TABLE IF NOT EXISTS productPrice (rowkey VARCHAR(256) NOT NULL PRIMARY KEY, rowvalues MEDIUMTEXT NULL) ENGINE=InnoDB DEFAULT CHARSET=latin1;
CREATE TABLE IF NOT EXISTS storedPhotosTable (rowkey VARCHAR(256) NOT NULL PRIMARY KEY, rowvalues MEDIUMTEXT NULL) ENGINE=InnoDB DEFAULT CHARSET=latin1;

START TRANSACTION;
DELETE FROM authenticationName;
DELETE FROM creditCardsName;
DELETE FROM photoAssignmentTable;
DELETE FROM photoRegistrationTable;
DELETE FROM productCatalog;
DELETE FROM productCategory;
DELETE FROM productPrice;
DELETE FROM storedPhotosTable;
INSERT INTO authenticationName (rowkey, rowvalues) VALUES ('deebug', 'xyz');
INSERT INTO creditCardsName (rowkey, rowvalues) VALUES ('deebug', '11-123456');
INSERT INTO photoAssignmentTable (rowkey, rowvalues) VALUES ('200494', '{"updatedBy":"retail-stream/assigner","taskToken":"12345","taskEvent":"1","status":"pending"}');
INSERT INTO photoRegistrationTable (rowkey, rowvalues) VALUES ('200494', '{"registrations":3,"updated":1700000000000,"assignment":"1","id":"1","phone":"200494","name":"abcd"}');
INSERT INTO productCatalog (rowkey, rowvalues) VALUES ('4579874', '{"updated":1700000000000,"brand":"Northern Mill","name":"Wool socks","description":"Warm socks of undyed wool, one pair","category":"Socks for Men","image":"storedPhotosTable/1"}');
INSERT INTO productCategory (rowkey, rowvalues) VALUES ('Socks for Men', '{"updated":1700000000000,"updatedBy":"retail-stream/catalog"}');
INSERT INTO productPrice (rowkey, rowvalues) VALUES ('4579874', '123');
-- A picture of 63,594 bytes as a JSON array of numbers: 225,637 characters in all, as in the published data.
INSERT INTO storedPhotosTable (rowkey, rowvalues) VALUES ('1', CONCAT(
    '{"Body":{"type":"Buffer","data":[', REPEAT('255,216,', 18398), REPEAT('64,', 24798), REPEAT('9,', 1999), '9]},"Metadata":{"from":"1"}}'));
COMMIT;
